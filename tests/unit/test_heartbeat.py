"""The watch: a run is given up when no rank goes on, and not because one of them waits or was suspended."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from megatron_paint.run import heartbeat
from megatron_paint.run.heartbeat import HUNG, Heart, clear_beats, read_beats, slowest
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
    made = Heart(folder, rank=rank, limit=LIMIT, give_up=said.append, write_seconds=0.1)
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
heart = Heart(Path(sys.argv[1]), rank=0, limit=1.5, give_up=print, write_seconds=0.1)
heart.start()
heart.beat("rollout", 1)
for _ in range(6):  # it waits for less than the limit, and is suspended meanwhile
    time.sleep(0.1)
heart.stop()
"""


def test_a_process_that_was_suspended_is_not_taken_for_a_hang(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", SUSPENDED, tmp_path], stdout=subprocess.PIPE, text=True)
    until(lambda: any(beat.step == 1 for beat in read_beats(tmp_path)), seconds=60, otherwise=lambda: "it never began")
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(3.0)
    os.kill(process.pid, signal.SIGCONT)
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "")


def test_beats_of_an_earlier_life_go_and_its_stacks_stay(tmp_path):
    for name in ("rank_00007.json", ".rank_00007.123.unfinished", "stacks_00007.txt"):
        (tmp_path / name).touch()
    clear_beats(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["stacks_00007.txt"]
    clear_beats(tmp_path / "no folder")


def test_a_disk_that_refuses_a_beat_keeps_nothing_of_it(tmp_path, monkeypatch):
    said = []
    made = Heart(tmp_path, rank=0, limit=None, give_up=said.append)
    monkeypatch.setattr(heartbeat.Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    made.start()
    made.stop()
    assert list(tmp_path.iterdir()) == []


def test_the_slowest_rank_is_that_of_the_earliest_step(tmp_path):
    for rank, step in ((0, 3), (1, 2), (2, 2)):
        made = Heart(tmp_path, rank=rank, limit=None, give_up=print)
        made.start()
        made.beat("student", step)
        made.stop()
    assert slowest(read_beats(tmp_path)).rank == 1
