"""The lock of a run folder: never two owners, never a run that cannot start, whoever dies at whatever moment."""

import dataclasses
import errno
import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megatron_paint.base.errors import UserError
from megatron_paint.run.lock import RunLock, locked
from megatron_paint.run.lock_owner import from_text, process_state, this_process, to_text
from megatron_paint.run.lock_watch import LOCK, Timing, refuse_if_in_use
from tests.run.lock_racer import TIMING

ROOT = Path(__file__).parents[2]
FORK = multiprocessing.get_context("fork")
RACES, TAKERS = 50, 6
# For an owner that is alive: on a busy machine, half a second may pass between two of its heartbeats.
PATIENT = dataclasses.replace(TIMING, look=5.0, limit=15.0)


def dead_process():
    """Process id and owner of a process that has ended."""
    parent, child = FORK.Pipe(duplex=False)

    def leave():
        child.send(to_text(this_process()))

    process = FORK.Process(target=leave)
    process.start()
    owner = from_text(parent.recv(), unreadable="")
    process.join()
    return owner


def left_by(folder, owner, *, age=0.0):
    """A lock file of this owner, with a heartbeat so many seconds ago."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LOCK).write_text(to_text(owner))
    os.utime(folder / LOCK, (time.time() - age,) * 2)


def elsewhere(**changes):
    """An owner on another machine."""
    return dataclasses.replace(this_process(), host="node7", machine="another", pid=4321, **changes)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# One process


def test_taken_and_released(tmp_path):
    folder = tmp_path / "runs" / "x"
    lock = RunLock(folder)
    assert lock.take() == ""
    found = json.loads((folder / LOCK).read_text())
    assert (found["host"], found["pid"]) == (socket.gethostname(), os.getpid())
    assert found["started"] == int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    assert names(folder) == [LOCK]
    lock.release()
    assert names(tmp_path) == []  # the run left nothing, so its folder goes as well


def test_a_folder_with_something_in_it_stays(tmp_path):
    with locked(tmp_path / "x", say=print, on_lost=None):
        (tmp_path / "x" / "config.yaml").touch()
    assert names(tmp_path / "x") == ["config.yaml"]


def test_a_living_owner_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    lock = RunLock(tmp_path)
    lock.take()
    with pytest.raises(UserError) as caught:
        RunLock(tmp_path).take()
    message = str(caught.value)
    assert f"process {os.getpid()} on {socket.gethostname()}, Slurm job 77" in message
    assert "end it (scancel 77), or give another run.dir" in message
    assert str(tmp_path / LOCK) in message
    for watches in (True, False):
        with pytest.raises(UserError, match=f"process {os.getpid()} on"):
            refuse_if_in_use(tmp_path, watches=watches)
    assert names(tmp_path) == [LOCK]
    lock.release()
    refuse_if_in_use(tmp_path)


def test_an_owner_that_is_gone(tmp_path):
    owner = dead_process()
    left_by(tmp_path, owner)
    lock = RunLock(tmp_path)
    assert lock.take() == (
        f"took over the lock of {tmp_path} from process {owner.pid} on {socket.gethostname()}: its process is gone"
    )
    assert names(tmp_path) == [LOCK]
    lock.release()


def test_a_process_id_that_another_process_has_now(tmp_path):
    owner = dataclasses.replace(this_process(), started=this_process().started - 1)
    left_by(tmp_path, owner)
    assert "its process is gone" in RunLock(tmp_path).take()


def test_equal_host_names_say_nothing_where_the_kernel_names_no_boot(tmp_path, monkeypatch):
    """The owner may be a process of another host with the same name, so its process id says nothing here."""
    monkeypatch.setattr("megatron_paint.run.lock_owner.BOOT", tmp_path / "missing")
    owner = dead_process()
    assert this_process().machine == owner.machine == ""
    assert process_state(owner) == "unknown"
    assert process_state(dataclasses.replace(owner, machine=socket.gethostname())) == "unknown"


def test_a_zombie_is_gone():
    child = subprocess.Popen([sys.executable, "-c", ""])
    owner = dataclasses.replace(this_process(), pid=child.pid, started=None)
    while Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    assert process_state(owner) == "gone"
    child.wait()
    assert process_state(owner) == "gone"


def test_the_lost_answer_of_a_file_server(tmp_path, monkeypatch):
    """The link was made, and the client's second try reports that it exists."""
    link = os.link

    def answer_lost(source, target):
        link(source, target)
        raise FileExistsError(errno.EEXIST, "exists")

    monkeypatch.setattr(os, "link", answer_lost)
    lock = RunLock(tmp_path)
    assert lock.take() == ""
    lock.release()
    assert names(tmp_path) == []


def test_a_disk_without_hard_links(tmp_path, monkeypatch):
    def refused(source, target):
        raise PermissionError(errno.EPERM, "not permitted")

    monkeypatch.setattr(os, "link", refused)
    lock = RunLock(tmp_path)
    lock.take()
    with pytest.raises(UserError, match="is in use"):
        RunLock(tmp_path).take()
    lock.release()
    (tmp_path / LOCK).touch()  # the crash of a process that had not written its name
    assert "unknown host: its heartbeat has stopped" in RunLock(tmp_path, timing=TIMING).take()


def test_a_disk_that_refuses(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"^run\.dir: Cannot write .*file"):
        RunLock(tmp_path / "file").take()
    with pytest.raises(UserError, match=r"^run\.dir: Cannot write .*file"):
        RunLock(tmp_path / "file" / "below").take()


def test_a_lock_that_a_user_has_removed(tmp_path):
    """It is written again with the next heartbeat, unless somebody may have trained in the meantime."""
    lock = RunLock(tmp_path, timing=TIMING)
    lock.take()
    (tmp_path / LOCK).unlink()
    while not (tmp_path / LOCK).exists():
        time.sleep(0.02)
    lock.stop()
    (tmp_path / LOCK).unlink()
    time.sleep(TIMING.look + 0.1)  # as if it was suspended
    with pytest.raises(UserError, match="was taken over"):
        lock.confirm()


# Other machines


def beating(path, *, behind=0.0):
    """A function that stops the heartbeats which it has begun to write. behind: seconds of their clock."""
    ended = threading.Event()

    def beat():
        while not ended.wait(TIMING.renew):
            os.utime(path, (time.time() - behind,) * 2)

    thread = threading.Thread(target=beat)
    thread.start()
    return lambda: (ended.set(), thread.join())


def test_an_owner_elsewhere_lives_while_its_heart_beats(tmp_path, monkeypatch):
    """Whatever this host's clock shows."""
    left_by(tmp_path, elsewhere())
    stop = beating(tmp_path / LOCK)
    now = time.time
    try:
        for skew in (-1e6, 0.0, 1e6):
            monkeypatch.setattr(time, "time", lambda skew=skew: now() + skew)
            with pytest.raises(UserError, match=r"process 4321 on node7.*kill 4321 on node7"):
                RunLock(tmp_path, timing=PATIENT).take()
            with pytest.raises(UserError, match="process 4321 on node7"):
                refuse_if_in_use(tmp_path, timing=PATIENT)
    finally:
        stop()
    refuse_if_in_use(tmp_path, timing=TIMING)
    started, waits = time.monotonic(), []
    assert "on node7: its heartbeat has stopped" in RunLock(tmp_path, timing=TIMING).take(on_wait=waits.append)
    assert waits == [f"{tmp_path} is locked by process 4321 on node7: watching its heartbeat, for 1.5 s at most"]
    assert time.monotonic() - started < TIMING.limit + 1


def test_an_old_heartbeat_is_looked_at_before_it_counts(tmp_path):
    """After a time in which nobody could reach the file server, all heartbeats are old."""
    left_by(tmp_path, elsewhere(), age=1000.0)
    stop = beating(tmp_path / LOCK)
    try:
        with pytest.raises(UserError, match="node7"):
            RunLock(tmp_path, timing=PATIENT).take()
    finally:
        stop()


# Many processes


class Gate:
    """Processes that pass it wait until it is opened. A killed process cannot hold it."""

    def __init__(self):
        self._read, self._write = os.pipe()

    def pass_through(self):
        os.close(self._write)
        os.read(self._read, 1)

    def open(self):
        os.close(self._write)
        os.close(self._read)


class Race:
    """Processes that take one lock at the same moment. Each owner checks that no other owner lives."""

    def __init__(self, folder, told):
        self.folder, self.inside, self.told = folder, folder / "inside", told
        told.mkdir()
        self._begin, self._end = Gate(), Gate()
        self.processes = [FORK.Process(target=self._taker) for _ in range(TAKERS)]
        for process in self.processes:
            process.start()
        self._begin.open()

    def end(self):
        """Lets the owner go, and returns what each process has told."""
        self._end.open()
        for process in self.processes:
            process.join(30)
            assert process.exitcode in (0, -signal.SIGKILL), process
        return self.results()

    def results(self):
        return [file.name.split("-")[0] for file in self.told.iterdir()]

    def _tell(self, what):
        (self.told / f"{what}-{os.getpid()}").touch()

    def _taker(self):
        lock = RunLock(self.folder, timing=TIMING)
        self._begin.pass_through()
        try:
            lock.take()
        except UserError:
            self._tell("refused")
            os._exit(0)
        if self.inside.exists() and is_running(int(self.inside.read_text())):
            self._tell("beside another")
        mine = self.told.with_name(f"inside-{os.getpid()}")
        mine.write_text(str(os.getpid()))
        os.replace(mine, self.inside)  # in one step: it may be killed at any moment
        self._tell("owner")
        self._end.pass_through()
        self.inside.unlink()
        lock.confirm()
        lock.release()
        os._exit(0)


def is_running(pid):
    return process_state(dataclasses.replace(this_process(), pid=pid, started=None)) != "gone"


def test_of_many_takers_of_a_dead_lock_exactly_one_wins(tmp_path):
    for number in range(RACES // 2):
        folder = tmp_path / str(number)
        left_by(folder, dead_process())
        race = Race(folder, tmp_path / f"told{number}")
        while len(race.results()) < TAKERS:
            time.sleep(0.002)
        assert sorted(race.end()) == ["owner", *["refused"] * (TAKERS - 1)]
        assert names(folder) == []


def test_takers_that_are_killed_at_any_moment(tmp_path):
    """Never two owners; and whoever was killed, the next start takes the lock."""
    draw = random.Random(5)
    folder = tmp_path / "run"
    owners = 0
    for number in range(RACES // 2):
        left_by(folder, dead_process())
        race = Race(folder, tmp_path / f"told{number}")
        for process in draw.sample(race.processes, TAKERS - 1):
            time.sleep(draw.choice((0.0, 0.0005, 0.002, 0.005)))
            os.kill(process.pid, signal.SIGKILL)
        results = race.end()
        assert "beside another" not in results
        owners += results.count("owner")
        lock = RunLock(folder, timing=TIMING)
        lock.take()
        lock.release()
        assert not (folder / LOCK).exists()
    assert owners


@pytest.mark.parametrize("moment", ["after the other has the lock", "before the other has the lock"])
def test_a_taker_that_is_suspended_does_not_replace_a_newer_lock(tmp_path, monkeypatch, moment):
    """It continues in the rename, when another process has taken its `.next` file over."""
    left_by(tmp_path, dead_process())
    slow, fast = RunLock(tmp_path, timing=TIMING, owner=elsewhere()), RunLock(tmp_path, timing=TIMING)
    other = threading.Thread(target=fast.take, daemon=True)
    at_rename, continues, replace = threading.Event(), threading.Event(), os.replace

    def suspended(source, target):
        """The other process takes the lock in the first call, which is the slow one's."""
        if target == tmp_path / LOCK and threading.current_thread() is other:
            at_rename.set()
            if moment.startswith("before"):
                continues.wait()
        elif target == tmp_path / LOCK:
            other.start()
            at_rename.wait()
            if moment.startswith("after"):
                other.join()
        replace(source, target)

    monkeypatch.setattr(os, "replace", suspended)
    with pytest.raises(UserError, match=f"process {os.getpid()} on {socket.gethostname()} has owned it"):
        slow.take()
    continues.set()
    other.join()
    fast.confirm()
    assert names(tmp_path) == [LOCK]
    fast.release()


def killed_in_release(folder):
    """Takes the lock and dies between the two files that `release` creates and removes."""
    lock = RunLock(folder, timing=TIMING)
    lock.take()
    unlink = Path.unlink

    def dies(path, **options):
        if path.name == LOCK:
            os.kill(os.getpid(), signal.SIGKILL)
        unlink(path, **options)

    Path.unlink = dies
    lock.release()


@pytest.mark.parametrize("earlier_version", [False, True])
def test_an_owner_that_was_killed_while_it_released_the_lock(tmp_path, earlier_version):
    """It leaves its lock and the file of a process that replaces it."""
    process = FORK.Process(target=killed_in_release, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    dead = from_text((tmp_path / LOCK).read_text(), unreadable="")
    left = tmp_path / f".{LOCK}.{dead.token}.next"
    assert from_text(left.read_text(), unreadable="").token != dead.token
    if earlier_version:  # it wrote the token of its lock
        left.write_text(to_text(dead))
    lock = RunLock(tmp_path, timing=TIMING)
    assert lock.take().endswith("its process is gone")
    lock.confirm()
    lock.release()
    assert not (tmp_path / LOCK).exists()


def test_what_the_dead_have_left_is_removed_some_time_later(tmp_path):
    old, new = tmp_path / f".{LOCK}.a.next", tmp_path / f".{LOCK}.b.new"
    for file, age in ((old, 500.0), (new, 1.0)):
        file.touch()
        os.utime(file, (time.time() - age,) * 2)
    lock = RunLock(tmp_path)
    lock.take()
    assert names(tmp_path) == [new.name, LOCK]
    lock.release()


def test_timing_leaves_room_for_missed_heartbeats():
    timing = Timing()
    assert timing.renew * 2 < timing.look < timing.limit
