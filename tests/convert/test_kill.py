"""A conversion that is killed or fills the disk leaves no output. The same command then finishes the work."""

import json
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

from megatron_paint.cli.main import main
from megatron_paint.convert.check import compare
from tests.convert.family import make_member

ROOT = Path(__file__).parents[2]
# Small tasks, so that the conversion can be interrupted in the middle.
COMMAND = """
import sys
from megatron_paint.cli import convert_options
from megatron_paint.convert import work
work.TASK_BYTES = 20_000
sys.exit(convert_options.main())
"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    make_member(folder / "hf", "moe")
    assert main(["convert", "to-megatron", str(folder / "hf"), str(folder / "megatron"), "--quiet"]) == 0
    return folder


def arguments(action: str, sources: Path, out: Path) -> list[str]:
    given = {"to-megatron": [sources / "hf", out], "to-hf": [sources / "megatron", out, "--base", sources / "hf"]}
    return ["-c", COMMAND, action, *map(str, given[action]), "--json"]


def start(command: list[str], **options) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=environment, stdout=-1, stderr=-1, text=True, **options
    )


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
def test_killed_and_resumed(action, processes, sources, tmp_path):
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
        running.send_signal(signal.SIGKILL)
        _, problem = running.communicate()
        wait_until(lambda workers=workers: not any(map(is_alive, workers)))
        if out.exists():  # the conversion ended before this process could kill it
            shutil.rmtree(out)
            before = set()
            continue
        assert running.returncode == -signal.SIGKILL, problem
        assert before <= done()
        before = done()
        kills += 1
    kept = sum(json.loads((records / name).read_text())["nbytes"] for name in before)
    finishing = start(command)
    printed, problem = finishing.communicate(timeout=600)
    assert finishing.returncode == 0, problem
    summary = json.loads(printed)
    assert 0 < kept == summary["resumed_bytes"] <= summary["bytes"]  # finished tasks are not done again
    assert is_right(action, sources, out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("action", ["to-megatron", "to-hf"])
@pytest.mark.parametrize(("limit", "processes"), [(600, 1), (15_000, 2)])
def test_a_full_disk(action, processes, limit, sources, tmp_path):
    """No file may grow beyond `limit` bytes. The command prints one line and makes no output. Later it succeeds."""
    out = tmp_path / "out"
    command = [*arguments(action, sources, out), "--processes", str(processes)]
    limits = (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    running = start(command, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits))
    _, problem = running.communicate(timeout=600)
    lines = problem.strip().splitlines()
    assert running.returncode == 2, problem
    assert len(lines) == 1, problem
    assert f"Cannot write {tmp_path}" in lines[0]
    assert "write to another disk" in lines[0]
    assert not out.exists()
    again = start(command)
    _, problem = again.communicate(timeout=600)
    assert again.returncode == 0, problem
    assert is_right(action, sources, out)
