"""The watchdog: it ends a run if no rank makes progress, but not because a rank waits or was suspended."""

import errno
import json
import threading
from dataclasses import asdict

import pytest

from megatron_paint.runtime import heartbeat
from megatron_paint.runtime.heartbeat import (
    HUNG,
    HUNG_RUN,
    Heartbeat,
    RankObserver,
    Watchdog,
    clear_heartbeats,
    read_heartbeats,
    slowest,
)
from tests.support.until import until

LIMIT, LOOK = 100.0, 10.0  # seconds of a clock that the tests turn


class Ended(SystemExit):
    """What os._exit is made to raise."""


@pytest.fixture
def ends(monkeypatch):
    """Exit statuses with which processes would have ended."""
    statuses = []

    def end(status):
        statuses.append(status)
        raise Ended

    monkeypatch.setattr(heartbeat.os, "_exit", end)
    monkeypatch.setattr(heartbeat.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(threading.Timer, "start", lambda self: None)
    return statuses


class Watched:
    """Watchdogs of all ranks of a run, in their first rollout, and the clock by which they look at it."""

    def __init__(self, folder, ranks=2):
        self.said, self.now = [], 0.0
        self.watchdogs = [
            Watchdog(folder, rank=rank, ranks=ranks, limit=LIMIT, give_up=self.said.append, write_seconds=LOOK)
            for rank in range(ranks)
        ]
        for watchdog in self.watchdogs:
            watchdog.mark_progress("rollout", 1)
            watchdog._write()

    def look(self, after=LOOK):
        """The ranks whose watch has given the run up, of those that look once more, after so many seconds."""
        self.now += after
        gave_up = []
        for watchdog in self.watchdogs:
            try:
                watchdog._look(self.now)
            except Ended:
                gave_up.append(watchdog.rank)
        return gave_up

    def until_given_up(self):
        """Seconds until all ranks give up the run."""
        began = self.now
        while not (gave_up := self.look()):
            assert self.now < began + 100 * LIMIT
        assert gave_up == [watchdog.rank for watchdog in self.watchdogs]
        return self.now - began


def test_a_rank_that_waits_is_not_hung_while_another_makes_progress(tmp_path, ends):
    watched = Watched(tmp_path)
    for _ in range(50):
        watched.watchdogs[1].mark_progress()
        assert watched.look() == []
    assert 1.0 * LIMIT <= watched.until_given_up() <= 2.0 * LIMIT
    assert ends == [HUNG, HUNG]
    (message,) = watched.said
    assert "no progress: rank 0 on " in message, "it was the first without progress"
    assert all(heartbeat.hung for heartbeat in read_heartbeats(tmp_path))
    assert {file.name for file in tmp_path.glob("stacks_*")} == {"stacks_00000.txt", "stacks_00001.txt"}


def test_a_rank_in_a_long_phase_holds_the_others_up_for_longer(tmp_path, ends):
    watched = Watched(tmp_path)
    watched.watchdogs[1].mark_progress("checkpoint")
    assert 10.0 * LIMIT <= watched.until_given_up() <= 11.0 * LIMIT
    assert ends == [HUNG, HUNG]


def test_a_process_that_was_suspended_is_not_taken_for_a_hang(tmp_path, ends):
    """The clock continues meanwhile, and rank 0 waits for rank 1 before and after."""
    watched = Watched(tmp_path)
    for number in range(50):
        if number % 5 == 0:
            watched.watchdogs[1].mark_progress()
        assert watched.look(after=1000.0 if number % 10 == 9 else LOOK) == []


def test_a_disk_that_fails_is_not_taken_for_a_hang(tmp_path, ends, monkeypatch):
    """And when the disk works again, the watchdog still works."""

    def fail(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    watched = Watched(tmp_path)
    for name in ("exists", "glob"):
        with monkeypatch.context() as disk:
            disk.setattr(heartbeat.Path, name, fail)
            for _ in range(50):
                assert watched.look() == []
    assert read_heartbeats(tmp_path)
    watched.until_given_up()
    assert len(watched.said) == 1


def test_who_sees_that_a_rank_gave_up_sees_which(tmp_path, ends, monkeypatch):
    """So a rank that the disk delays at that moment is not reported by another rank too."""
    seen, touch = [], heartbeat.Path.touch

    def see(path):
        seen.append([(heartbeat.rank, heartbeat.hung) for heartbeat in read_heartbeats(tmp_path)])
        touch(path)

    monkeypatch.setattr(heartbeat.Path, "touch", see)
    Watched(tmp_path).until_given_up()
    assert seen == [[(0, True), (1, False)], [(0, True), (1, True)]]


def test_a_rank_that_cannot_read_what_others_wrote_speaks_for_itself(tmp_path, ends, monkeypatch):
    watched = Watched(tmp_path, ranks=1)
    monkeypatch.setattr(heartbeat.time, "sleep", lambda seconds: [file.unlink() for file in tmp_path.glob("rank_*")])
    watched.until_given_up()
    (message,) = watched.said
    assert "no progress: rank 0 on " in message


def write(folder, rank, since, phase="rollout"):
    heartbeat = Heartbeat(rank=rank, host="n1", pid=1, step=1, phase=phase, since=since, written=since)
    (folder / f"rank_{rank:05d}.json").write_text(json.dumps(asdict(heartbeat)))


def test_clocks_of_hosts_are_not_compared(tmp_path):
    """Rank 1's host is a day behind; it moves, and then it does not."""
    observer = RankObserver(tmp_path, ranks=2, limit=100.0)
    write(tmp_path, 0, since=1e6)
    write(tmp_path, 1, since=1e6 - 86_400.0)
    assert not observer.all_quiet(50.0)
    write(tmp_path, 1, since=1e6 - 86_340.0)
    assert not observer.all_quiet(149.0)
    assert not observer.all_quiet(248.0)
    assert observer.all_quiet(249.0)


def test_a_rank_that_is_not_known_is_not_taken_for_quiet(tmp_path):
    observer = RankObserver(tmp_path, ranks=2, limit=100.0)
    write(tmp_path, 0, since=1.0)
    assert not observer.all_quiet(0.0)
    assert not observer.all_quiet(1e9)
    write(tmp_path, 1, since=1.0)
    (tmp_path / "rank_00001.json").write_text("cut sho")
    assert not observer.all_quiet(2e9)
    write(tmp_path, 1, since=1.0, phase="evaluation")
    assert not observer.all_quiet(2e9)
    assert not observer.all_quiet(2e9 + 999.0)
    assert observer.all_quiet(2e9 + 1000.0)


def test_a_watch_that_cannot_write_ends_the_process_all_the_same(tmp_path, monkeypatch):
    statuses, held = [], threading.Event()
    monkeypatch.setattr(heartbeat.os, "_exit", lambda status: (statuses.append(status), held.set()))
    monkeypatch.setattr(heartbeat, "SETTLE_SECONDS", 0.2)
    monkeypatch.setattr(heartbeat.faulthandler, "dump_traceback", lambda *_, **__: held.wait(60))
    made = Watchdog(tmp_path, rank=0, ranks=1, limit=0.6, give_up=print, write_seconds=0.1)
    made.start()
    made.mark_progress("rollout", 1)
    until(lambda: statuses, seconds=60, otherwise=lambda: "it never ended")
    assert statuses[0] == HUNG
    made.stop()


def test_beats_from_before_a_restart_are_removed_and_stacks_stay(tmp_path):
    for name in ("rank_00007.json", ".rank_00007.123.unfinished", HUNG_RUN, "stacks_00007.txt"):
        (tmp_path / name).touch()
    clear_heartbeats(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["stacks_00007.txt"]
    clear_heartbeats(tmp_path / "no folder")


def test_a_disk_that_refuses_a_beat_keeps_nothing_of_it(tmp_path, monkeypatch):
    said = []
    made = Watchdog(tmp_path, rank=0, ranks=1, limit=None, give_up=said.append)
    monkeypatch.setattr(heartbeat.Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    made.start()
    made.stop()
    assert list(tmp_path.iterdir()) == []


def test_the_slowest_rank_is_that_of_the_earliest_step(tmp_path):
    for rank, step in ((0, 3), (1, 2), (2, 2)):
        made = Watchdog(tmp_path, rank=rank, ranks=3, limit=None, give_up=print)
        made.start()
        made.mark_progress("student", step)
        made.stop()
    assert slowest(read_heartbeats(tmp_path)).rank == 1
