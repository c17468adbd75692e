"""A conversion that is killed or fills the disk leaves no output. The same command then finishes the work.

`make test` forks the command and its workers from the tests' process. Long: the same in new processes.
"""

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_paint.cli import convert_options
from megatron_paint.cli.main import main
from megatron_paint.convert import work
from megatron_paint.convert.check import compare
from tests.convert.family import make_member
from tests.support.forked_command import ForkedCommand

ROOT = Path(__file__).parents[2]
TASK_BYTES = 20_000  # small tasks, so that the conversion can be interrupted in the middle
COMMAND = f"""
import sys
from megatron_paint.cli import convert_options
from megatron_paint.convert import work
work.TASK_BYTES = {TASK_BYTES}
sys.exit(convert_options.main())
"""


class NewCommand:
    """The conversion in a new Python, which starts new workers."""

    def __init__(self, arguments: list[str], file_size: int | None) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self._process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, *arguments],
            cwd=ROOT,
            env=environment,
            preexec_fn=lambda: limit_file_size(file_size),
            stdout=-1,
            stderr=-1,
            text=True,
        )
        self.pid, self.poll = self._process.pid, self._process.poll

    def end(self) -> tuple[int, str, str]:
        """Exit status, stdout and stderr."""
        printed, problem = self._process.communicate(timeout=600)
        return self._process.returncode, printed, problem


def forked_command(arguments: list[str], file_size: int | None) -> ForkedCommand:
    """The conversion in a fork of this process; it forks its workers."""

    def run() -> int:
        limit_file_size(file_size)
        work.TASK_BYTES = TASK_BYTES
        work.get_context = lambda _: multiprocessing.get_context("fork")
        return convert_options.main(arguments)

    return ForkedCommand(run)


def limit_file_size(most: int | None) -> None:
    """No file of this process may grow beyond so many bytes."""
    if most is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.fixture(params=[forked_command, pytest.param(NewCommand, marks=pytest.mark.long)], ids=["forked", "new"])
def start(request):
    """Starts a conversion: `start(arguments, file_size=None)`."""
    return lambda arguments, file_size=None: request.param(arguments, file_size)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    make_member(folder / "hf", "moe")
    assert main(["convert", "to-megatron", str(folder / "hf"), str(folder / "megatron"), "--quiet"]) == 0
    return folder


def arguments(action: str, sources: Path, out: Path) -> list[str]:
    given = {"to-megatron": [sources / "hf", out], "to-hf": [sources / "megatron", out, "--base", sources / "hf"]}
    return [action, *map(str, given[action]), "--json"]


def is_right(action: str, sources: Path, out: Path) -> bool:
    if action == "to-megatron":
        return compare(sources / "hf", out).equal
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (out, sources / "hf"))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def wait_until(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def descendants(pid: int) -> list[int]:
    found = [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [*found, *(grandchild for child in found for grandchild in descendants(child))]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("action", ["to-megatron", "to-hf"])
def test_killed_and_resumed(action, processes, start, sources, tmp_path):
    generator, out = random.Random(processes), tmp_path / "out"
    command = [*arguments(action, sources, out), "--processes", str(processes)]
    records = tmp_path / ".out.unfinished" / "records"

    def done() -> set[str]:
        return {path.name for path in records.glob("*.json")} if records.exists() else set()

    before: set[str] = set()
    kills = 0
    while kills < 2:
        running = start(command)
        wanted = len(before) + generator.randint(1, 5)
        wait_until(lambda wanted=wanted, running=running: len(done()) >= wanted or running.poll() is not None)
        workers = descendants(running.pid) if running.poll() is None else []
        os.kill(running.pid, signal.SIGKILL)
        status, _, problem = running.end()
        wait_until(lambda workers=workers: not any(map(is_alive, workers)))
        if out.exists():  # the conversion ended before this process could kill it
            shutil.rmtree(out)
            before = set()
            continue
        assert status == -signal.SIGKILL, problem
        assert before <= done()
        before = done()
        kills += 1
    kept = sum(json.loads((records / name).read_text())["nbytes"] for name in before)
    status, printed, problem = start(command).end()
    assert status == 0, problem
    summary = json.loads(printed)
    assert 0 < kept == summary["resumed_bytes"] <= summary["bytes"]  # finished tasks are not done again
    assert is_right(action, sources, out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("action", ["to-megatron", "to-hf"])
@pytest.mark.parametrize(("limit", "processes"), [(600, 1), (15_000, 2)])
def test_a_full_disk(action, processes, limit, start, sources, tmp_path):
    """No file may grow beyond `limit` bytes. The command prints one line and makes no output. Later it succeeds."""
    out = tmp_path / "out"
    command = [*arguments(action, sources, out), "--processes", str(processes)]
    status, _, problem = start(command, limit).end()
    lines = problem.strip().splitlines()
    assert status == 2, problem
    assert len(lines) == 1, problem
    assert f"Cannot write {tmp_path}" in lines[0]
    assert "write to another disk" in lines[0]
    assert not out.exists()
    status, _, problem = start(command).end()
    assert status == 0, problem
    assert is_right(action, sources, out)
