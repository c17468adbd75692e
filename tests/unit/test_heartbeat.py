"""The watch: a run is given up when no rank goes on, and not because one of them waits or was suspended."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict

import pytest

from megatron_paint.run import heartbeat
from megatron_paint.run.heartbeat import HUNG, HUNG_RUN, Beat, Heart, Others, clear_beats, read_beats, slowest
from tests.slurm.until import until

LIMIT = 0.6


class Ended(SystemExit):
    """What os._exit is made to raise: it ends the watch's thread alone."""


@pytest.fixture
def ends(monkeypatch):
    """Exit statuses with which processes would have ended."""
    statuses = []

    def end(status):
        statuses.append(status)
        raise Ended

    monkeypatch.setattr(heartbeat.os, "_exit", end)
    monkeypatch.setattr(heartbeat, "SETTLE_SECONDS", 0.2)
    monkeypatch.setattr(threading.Timer, "start", lambda self: None)
    return statuses


def heart(folder, rank, said):
    made = Heart(folder, rank=rank, ranks=2, limit=LIMIT, give_up=said.append, write_seconds=0.1)
    made.start()
    made.beat("rollout", 1)
    return made


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_rank_that_waits_is_well_while_another_goes_on(tmp_path, ends):
    said = []
    _, busy = heart(tmp_path, 0, said), heart(tmp_path, 1, said)
    end = time.monotonic() + 5 * LIMIT
    while time.monotonic() < end:
        busy.beat()
        time.sleep(0.05)
    assert ends == said == []
    until(lambda: len(ends) == 2, seconds=20 * LIMIT, otherwise=lambda: f"ended: {ends}")
    assert ends == [HUNG, HUNG]
    (message,) = said
    assert "no progress: rank 0 on " in message, "it was the first to stand still"
    assert all(beat.hung for beat in read_beats(tmp_path))
    assert {file.name for file in tmp_path.glob("stacks_*")} == {"stacks_00000.txt", "stacks_00001.txt"}


def test_a_rank_in_a_long_phase_holds_the_others_up_for_longer(tmp_path, ends):
    said = []
    waiting, saving = heart(tmp_path, 0, said), heart(tmp_path, 1, said)
    saving.beat("checkpoint")
    time.sleep(5 * LIMIT)
    assert ends == said == []
    for made in (waiting, saving):
        made.stop()


SUSPENDED = """
import sys, time
from pathlib import Path
from megatron_paint.run.heartbeat import Heart
hearts = [Heart(Path(sys.argv[1]), rank=rank, ranks=2, limit=1.0, give_up=print, write_seconds=0.1) for rank in (0, 1)]
for heart in hearts:
    heart.start()
    heart.beat("rollout", 1)
for _ in range(10):  # rank 0 waits for rank 1, which goes on
    time.sleep(0.5)
    hearts[1].beat()
for heart in hearts:
    heart.stop()
"""


def test_a_process_that_was_suspended_is_not_taken_for_a_hang(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", SUSPENDED, tmp_path], stdout=subprocess.PIPE, text=True)
    until(lambda: any(beat.step == 1 for beat in read_beats(tmp_path)), seconds=60, otherwise=lambda: "it never began")
    time.sleep(1.6)  # rank 0 has looked at what rank 1 wrote
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(3.0)
    os.kill(process.pid, signal.SIGCONT)
    out, _ = process.communicate(timeout=600)
    assert (process.returncode, out) == (0, "")


def write(folder, rank, since, phase="rollout"):
    beat = Beat(rank=rank, host="n1", pid=1, step=1, phase=phase, since=since, written=since)
    (folder / f"rank_{rank:05d}.json").write_text(json.dumps(asdict(beat)))


def test_clocks_of_hosts_are_not_compared(tmp_path):
    """Rank 1's host is a day behind; it moves, and then it does not."""
    others = Others(tmp_path, ranks=2, limit=100.0)
    write(tmp_path, 0, since=1e6)
    write(tmp_path, 1, since=1e6 - 86_400.0)
    assert not others.all_quiet(50.0)
    write(tmp_path, 1, since=1e6 - 86_340.0)
    assert not others.all_quiet(149.0)
    assert not others.all_quiet(248.0)
    assert others.all_quiet(249.0)


def test_a_rank_that_is_not_known_is_not_taken_for_quiet(tmp_path):
    others = Others(tmp_path, ranks=2, limit=100.0)
    write(tmp_path, 0, since=1.0)
    assert not others.all_quiet(0.0)
    assert not others.all_quiet(1e9)
    write(tmp_path, 1, since=1.0)
    (tmp_path / "rank_00001.json").write_text("cut sho")
    assert not others.all_quiet(2e9)
    write(tmp_path, 1, since=1.0, phase="evaluation")
    assert not others.all_quiet(2e9)
    assert not others.all_quiet(2e9 + 999.0)
    assert others.all_quiet(2e9 + 1000.0)


def test_a_watch_that_cannot_write_ends_the_process_all_the_same(tmp_path, monkeypatch):
    statuses, held = [], threading.Event()
    monkeypatch.setattr(heartbeat.os, "_exit", lambda status: (statuses.append(status), held.set()))
    monkeypatch.setattr(heartbeat, "SETTLE_SECONDS", 0.2)
    monkeypatch.setattr(heartbeat.faulthandler, "dump_traceback", lambda *_, **__: held.wait(60))
    made = Heart(tmp_path, rank=0, ranks=1, limit=LIMIT, give_up=print, write_seconds=0.1)
    made.start()
    made.beat("rollout", 1)
    until(lambda: statuses, seconds=60, otherwise=lambda: "it never ended")
    assert statuses[0] == HUNG
    made.stop()


def test_beats_of_an_earlier_life_go_and_its_stacks_stay(tmp_path):
    for name in ("rank_00007.json", ".rank_00007.123.unfinished", HUNG_RUN, "stacks_00007.txt"):
        (tmp_path / name).touch()
    clear_beats(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["stacks_00007.txt"]
    clear_beats(tmp_path / "no folder")


def test_a_disk_that_refuses_a_beat_keeps_nothing_of_it(tmp_path, monkeypatch):
    said = []
    made = Heart(tmp_path, rank=0, ranks=1, limit=None, give_up=said.append)
    monkeypatch.setattr(heartbeat.Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    made.start()
    made.stop()
    assert list(tmp_path.iterdir()) == []


def test_the_slowest_rank_is_that_of_the_earliest_step(tmp_path):
    for rank, step in ((0, 3), (1, 2), (2, 2)):
        made = Heart(tmp_path, rank=rank, ranks=3, limit=None, give_up=print)
        made.start()
        made.beat("student", step)
        made.stop()
    assert slowest(read_beats(tmp_path)).rank == 1
