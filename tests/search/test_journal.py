"""The study's journal after kills, torn writes and dead owners of its lock."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from optuna.storages.journal import JournalFileBackend

from megatron_paint.base.errors import UserError
from megatron_paint.run.lock import RunLock
from megatron_paint.run.lock_owner import this_process
from megatron_paint.run.lock_watch import LOCK, InUse, Timing, read_lock
from megatron_paint.search import journal
from megatron_paint.search.journal import JOURNAL, Claim, StudyLock, repair

ROOT = Path(__file__).parents[2]
FAST = Timing(renew=0.05, look=0.2, limit=0.6)
# Appends lines under the lock until it is killed, and prints each number after it is on disk.
WRITER = """
import sys
from pathlib import Path
from optuna.storages.journal import JournalFileBackend
from megatron_paint.search.journal import JOURNAL, StudyLock
folder, name = Path(sys.argv[1]), sys.argv[2]
backend = JournalFileBackend(str(folder / JOURNAL), lock_obj=StudyLock(folder))
for number in range(int(sys.argv[3])):
    backend.append_logs([{"writer": name, "number": number, "padding": "x" * 5000}])
    print(number, flush=True)
"""


def writer(folder: Path, name: str, count: int) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder), name, str(count)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )


def lines(folder: Path) -> list[dict]:
    """The journal as Optuna's own backend reads it, without our lock."""
    return list(JournalFileBackend(str(folder / JOURNAL)).read_logs(0))


@pytest.mark.parametrize("size", [1, 40, 70_000, 200_000])
def test_a_torn_line_is_removed(tmp_path, size):
    journal = tmp_path / JOURNAL
    journal.write_bytes(b'{"a": 1}\n{"b": 2}\n' + b"x" * size)
    assert repair(journal)
    assert journal.read_bytes() == b'{"a": 1}\n{"b": 2}\n'
    assert not repair(journal)


def test_a_torn_first_line_and_no_journal(tmp_path):
    journal = tmp_path / JOURNAL
    assert not repair(journal)
    journal.write_bytes(b'{"a"')
    assert repair(journal)
    assert journal.read_bytes() == b""


def test_optuna_alone_would_lose_the_study(tmp_path):
    """The reason for `repair`: lines that follow a torn one make Optuna's reader refuse the file."""
    journal = tmp_path / JOURNAL
    for fixed in (False, True):
        journal.write_bytes(b'{"a": 1}\n{"b": ')
        lock = StudyLock(tmp_path) if fixed else None
        for number in (3, 4):
            JournalFileBackend(str(journal), lock_obj=lock).append_logs([{"c": number}])
        if fixed:
            assert lines(tmp_path) == [{"a": 1}, {"c": 3}, {"c": 4}]
        else:
            with pytest.raises(json.JSONDecodeError):
                lines(tmp_path)


def test_writers_killed_at_any_moment(tmp_path):
    """Two processes write side by side and are killed. What they were told is on disk; the next one does not wait."""
    writers = [writer(tmp_path, name, 10_000) for name in "ab"]
    told = {}
    for name, process in zip("ab", writers, strict=True):
        for _ in range(5):
            told[name] = int(process.stdout.readline())
    time.sleep(0.3)
    for process in writers:
        process.send_signal(signal.SIGKILL)
    for name, process in zip("ab", writers, strict=True):
        rest = process.stdout.read().split("\n")[:-1]
        told[name] = max([told[name], *map(int, rest)])
    started = time.monotonic()
    last = writer(tmp_path, "c", 1)
    assert last.wait(60) == 0
    assert time.monotonic() - started < 30
    found = lines(tmp_path)
    for name in "ab":
        numbers = [line["number"] for line in found if line["writer"] == name]
        assert numbers == list(range(len(numbers)))
        assert told[name] < len(numbers) <= told[name] + 2  # a line on disk may not have been printed
    assert found[-1]["writer"] == "c"


def test_the_lock_of_a_dead_process_here_is_taken_at_once(tmp_path):
    code = "import os, sys; from pathlib import Path; from megatron_paint.search.journal import StudyLock\n"
    code += "StudyLock(Path(sys.argv[1])).acquire(); os.kill(os.getpid(), 9)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment).returncode == -9
    assert (tmp_path / LOCK).exists()
    started = time.monotonic()
    with StudyLock(tmp_path).held():
        assert time.monotonic() - started < 5
    assert not (tmp_path / LOCK).exists()


def test_the_lock_of_a_silent_owner_elsewhere_is_taken_after_a_while(tmp_path):
    """Its process cannot be asked: only its heartbeat tells that it is dead."""
    elsewhere = replace(this_process(), host="elsewhere", machine="another")
    other = RunLock(tmp_path, timing=FAST, owner=elsewhere)
    other.take()
    other.stop()
    started = time.monotonic()
    with StudyLock(tmp_path, timing=FAST).held():
        assert FAST.look <= time.monotonic() - started < 10


def test_an_error_of_the_disk_does_not_keep_the_lock(tmp_path):
    (tmp_path / JOURNAL).mkdir()
    lock = StudyLock(tmp_path)
    with pytest.raises(UserError, match=JOURNAL):
        lock.acquire()
    assert not (tmp_path / LOCK).exists()
    (tmp_path / JOURNAL).rmdir()
    with lock.held(), pytest.raises(InUse):
        RunLock(tmp_path).take()
    assert not (tmp_path / LOCK).exists()


def test_a_lock_that_this_process_could_not_give_back_is_its_own(tmp_path):
    """On a full disk, the release writes nothing and leaves the file."""
    left = RunLock(tmp_path)
    left.take()
    left.stop()
    with StudyLock(tmp_path).held():
        assert read_lock(tmp_path / LOCK).token == left.owner.token
    assert not (tmp_path / LOCK).exists()


def test_the_holder_is_named_after_a_while(tmp_path, monkeypatch):
    code = "import sys; from pathlib import Path; from megatron_paint.search.journal import StudyLock\n"
    code += "lock = StudyLock(Path(sys.argv[1])); lock.acquire(); print(); sys.stdin.read(); lock.release()"
    command, environment = [sys.executable, "-uc", code, str(tmp_path)], os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"\n"
        monkeypatch.setattr(journal, "SAY_SECONDS", 0.1)
        lines = []

        def say(line):
            lines.append(line)
            other.stdin.close()  # now the other process gives it back

        with StudyLock(tmp_path, say=say).held():
            pass
    (line,) = lines
    assert line.startswith(f"megatron-paint: waiting for the lock of {tmp_path}: process {other.pid} on ")


def test_held_is_one_operation(tmp_path):
    """The lock can be taken again by its holder, and is given back by the outermost block."""
    lock = StudyLock(tmp_path)
    with lock.held():
        with lock.held():
            assert (tmp_path / LOCK).exists()
        assert (tmp_path / LOCK).exists()
        assert not Claim(tmp_path).take()
    assert not (tmp_path / LOCK).exists()


def test_a_claim_is_one_workers(tmp_path):
    here, other = Claim(tmp_path / "7", timing=FAST), Claim(tmp_path / "7", timing=FAST)
    assert here.take()
    assert other.seems_taken()
    assert not other.take()
    here.release()
    assert not other.seems_taken()
    assert other.take()
    other.release()
    assert not (tmp_path / "7").exists()


def test_a_claim_of_another_machine(tmp_path):
    """A recent heartbeat makes it seem taken; without one it is taken over."""
    folder = tmp_path / "7"
    elsewhere = RunLock(folder, timing=FAST, owner=replace(this_process(), host="elsewhere", machine="another"))
    elsewhere.take()
    claim = Claim(folder, timing=FAST)
    assert claim.seems_taken()
    assert not claim.take()  # it sees a heartbeat
    elsewhere.stop()
    time.sleep(FAST.limit + 0.2)
    assert not claim.seems_taken()
    assert claim.take()
    claim.confirm()
    claim.release()
