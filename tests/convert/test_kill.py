"""A conversion that is killed or fills the disk leaves no output. The same command then finishes the work."""

import json
import os
import random
import shutil
import signal
import time
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path

import pytest

from megatron_paint.__main__ import run
from megatron_paint.cli.main import main
from megatron_paint.convert import work
from megatron_paint.convert.check import compare
from megatron_paint.runtime.files import sync
from tests.convert.family import make_member
from tests.support import forked_ranks
from tests.support.exports import same, weights
from tests.support.processes import descendants, is_alive


def convert_in_small_tasks() -> None:
    """`megatron-paint convert` with so small tasks that there is a middle, and with forked processes.

    `test_convert.py` and `test_strict.py` start the processes as users do, each of which imports torch.
    """
    work.TASK_BYTES = 20_000
    work.sync = lambda path: (time.sleep(0.005), sync(path))  # as on a disk, so that a kill finds work left to do
    work.get_context = lambda _: get_context("fork")
    run()


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    make_member(folder / "hf", "moe")
    assert main(["convert", "to-megatron", str(folder / "hf"), str(folder / "megatron"), "--quiet"]) == 0
    return folder


def start(folder: Path, action: str, sources: Path, *options: object, file_size: int | None = None):
    """A conversion into folder/out, as a process that can be killed. What it prints goes to another folder."""
    out, printed = folder / "out", folder.parent / f"{folder.name}-printed"
    printed.mkdir(exist_ok=True)
    given = {"to-megatron": [sources / "hf", out], "to-hf": [sources / "megatron", out, "--base", sources / "hf"]}
    command = ("convert", action, *given[action], "--json", *options)
    target = "tests.convert.test_kill:convert_in_small_tasks"
    return forked_ranks.start_command(printed, *command, target=target, file_size=file_size)


def is_right(action: str, sources: Path, out: Path) -> bool:
    if action == "to-megatron":
        return compare(sources / "hf", out).equal
    return same(weights(out), weights(sources / "hf"))


def wait_until(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("action", ["to-megatron", "to-hf"])
def test_killed_and_resumed(action, processes, sources, tmp_path):
    generator, out = random.Random(processes), tmp_path / "out"
    options = ("--processes", processes)
    records = tmp_path / ".out.unfinished" / "records"

    def done() -> set[str]:
        return {path.name for path in records.glob("*.json")} if records.exists() else set()

    before: set[str] = set()
    kills = 0
    while kills < 2:
        running = start(tmp_path, action, sources, *options)
        wanted = len(before) + generator.randint(1, 5)
        wait_until(lambda wanted=wanted, running=running: len(done()) >= wanted or not running.is_alive)
        workers: list[int] = []
        with suppress(OSError):  # it has ended
            workers = descendants(running.pid)
            os.kill(running.pid, signal.SIGKILL)
        ended = running.wait()
        wait_until(lambda workers=workers: not any(map(is_alive, workers)))
        if out.exists():  # the conversion ended before this process could kill it
            shutil.rmtree(out)
            before = set()
            continue
        assert ended.statuses == [-signal.SIGKILL], ended
        assert before <= done()
        before = done()
        kills += 1
    kept = sum(json.loads((records / name).read_text())["nbytes"] for name in before)
    ended = start(tmp_path, action, sources, *options).wait()
    assert ended.statuses == [0], ended
    summary = json.loads(ended.out[0])
    assert 0 < kept == summary["resumed_bytes"] <= summary["bytes"]  # finished tasks are not done again
    assert is_right(action, sources, out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("action", ["to-megatron", "to-hf"])
@pytest.mark.parametrize(("limit", "processes"), [(600, 1), (15_000, 2)])
def test_a_full_disk(action, processes, limit, sources, tmp_path):
    """No file may grow beyond `limit` bytes, as on a full disk: one line and no output. Later it succeeds."""
    out, options = tmp_path / "out", ("--processes", processes)
    ended = start(tmp_path, action, sources, *options, file_size=limit).wait()
    assert f"Cannot write {tmp_path}" in ended.message
    assert "write to another disk" in ended.message
    assert not out.exists()
    ended = start(tmp_path, action, sources, *options).wait()
    assert ended.statuses == [0], ended
    assert is_right(action, sources, out)
