"""Disks that are full or read-only, for one rank or for all: one line, status 2, and what was whole stays whole."""

import itertools
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from megatron_paint.base.errors import UserError
from megatron_paint.cli.main import main
from megatron_paint.runtime.files import append_line
from tests.support import forked_ranks
from tests.support.exports import same, weights, weights_of_step

PAGE = 4096


@pytest.fixture
def disk(tmp_path):
    """Makes a disk of a size: `disk(bytes)` gives the folder that it is mounted on."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(size: int) -> Path:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"a disk of a chosen size cannot be mounted here: {done.stderr.strip()}")
        return folder

    yield mount
    subprocess.run(["umount", str(folder)], capture_output=True)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def up_to_step_2(run: Path, copy: Path) -> Path:
    """The run as it stood after step 2."""
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("step_000004*", "tensorboard"))
    return copy


def leave(folder: Path, free: int) -> None:
    """Fills the disk until so many bytes are free."""
    ballast = folder / "ballast"
    ballast.unlink(missing_ok=True)
    with open(ballast, "wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, shutil.disk_usage(folder).free - free)


def pages(folder: Path) -> int:
    return sum(-(-len(content) // PAGE) for content in files(folder).values())


@pytest.mark.parametrize(
    "waits", [pytest.param(True, marks=pytest.mark.long, id="waits"), pytest.param(False, id="goes_on")]
)
def test_a_full_disk_ends_the_run_wherever_it_is_met(trained, tmp_path, disk, waits):
    """A run that waits for its checkpoint meets it there; in one that continues, the export may take the room first."""
    mounted = disk(4_000_000)
    run = mounted / "run"
    whole = files(trained.run / "checkpoints" / "step_000002")
    size = pages(trained.run / "checkpoints" / "step_000002")
    arguments = (
        f"run.dir={run}",
        "run.resume=auto",
        "run.tensorboard=false",
        f"run.async_save={str(not waits).lower()}",
    )
    met = []
    for free in (3, 16, 32, size // 2, size + 20):
        shutil.rmtree(run, ignore_errors=True)
        up_to_step_2(trained.run, run)
        leave(mounted, free * PAGE)
        message = forked_ranks.train(tmp_path, trained.settings, *arguments).message
        met.append(message.removeprefix(f"megatron-paint: error: Cannot write {run}/").split("/")[0])
        assert "free space there" in message, (free, message)
        assert files(run / "checkpoints" / "step_000002") == whole
        assert (run / "checkpoints" / "step_000004").exists() == (run / "checkpoints/step_000004/complete").exists()
        assert not (waits and (run / "hf" / "step_000004").exists())
        assert not list(run.rglob("*.unfinished")), "what was begun is taken back"
    assert met[0] == "samples"
    assert set(met[1:]) <= {"checkpoints", "hf", "eval"}
    assert not waits or met[1:] == ["checkpoints", "checkpoints", "checkpoints", "hf"]
    (mounted / "ballast").unlink()
    assert forked_ranks.train(tmp_path, trained.settings, *arguments).statuses == [0, 0]
    assert same(weights_of_step(run, 4), weights_of_step(trained.run, 4))


def test_a_disk_that_refuses_one_rank_ends_all(trained, tmp_path):
    checkpoint, out = trained.run / "checkpoints" / "step_000004", tmp_path / "out"
    ended = forked_ranks.run(tmp_path, trained.settings, checkpoint, out, target="tests.end_to_end.disk_cases:main")
    assert ended.statuses == [0, 0], ended
    met, other = (json.loads(text) for text in ended.out)
    assert met["messages"] == other["messages"]
    assert met["messages"].pop("nothing") is None
    assert all(met["intact"].values()), met
    for case, message in met["messages"].items():
        place = "export" if case in ("export", "first of many shards", "flush of the export") else "checkpoint"
        assert message is not None, case
        assert message.startswith(f"Cannot write {out}/{place}: "), (case, message)
        assert "write to another disk" in message, (case, message)
    assert same(weights(out / "export"), weights_of_step(trained.run, 4))


def test_an_export_of_a_read_only_model_can_be_written(trained):
    for file in (trained.run / "hf" / "step_000004").iterdir():
        assert file.stat().st_mode & 0o200, file


def refused(capsys, *arguments: object) -> str:
    """The line that a run which cannot start is answered with."""
    assert main(["train", *map(str, arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_read_only_disk(trained, disk, capsys):
    mounted = disk(4_000_000)
    run = up_to_step_2(trained.run, mounted / "run")
    subprocess.run(["mount", "-o", "remount,ro", str(mounted)], check=True)
    for place in (run, mounted / "new"):
        line = refused(capsys, trained.settings, f"run.dir={place}", "run.resume=auto")
        assert f"run.dir={place} cannot be written: {mounted}" in line
        assert "is read-only or not yours to write" in line


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into any folder")
def test_a_folder_of_somebody_else(trained, tmp_path, capsys):
    (tmp_path / "theirs").mkdir(mode=0o555)
    line = refused(capsys, trained.settings, f"run.dir={tmp_path / 'theirs' / 'run'}")
    assert "theirs is read-only or not yours to write" in line


def test_metrics_end_with_a_whole_line_on_a_full_disk(disk):
    metrics = disk(16 * PAGE) / "metrics.jsonl"
    lines = (json.dumps({"step": step, "text": "x" * 300}) for step in range(1000))
    says = r"Cannot write .*metrics\.jsonl: No space left on device; free space there"
    with pytest.raises(UserError, match=says):
        list(map(append_line, itertools.repeat(metrics), lines))
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert len(steps) > 100
    assert steps == list(range(len(steps)))


def test_the_launcher_says_it_once(trained, tmp_path, disk):
    mounted = disk(4_000_000)
    run = up_to_step_2(trained.run, mounted / "run")
    leave(mounted, 60 * PAGE)
    arguments = ("train", trained.settings, f"run.dir={run}", "run.resume=auto", "run.async_save=false")
    ended = forked_ranks.start_command(tmp_path, *arguments, "--processes", "2", "--quiet").wait()
    assert ended.statuses == [2], ended
    # torch's remark on a machine that has a CUDA compiler and no GPU
    (line,) = (line for line in ended.err[0].splitlines() if "No CUDA runtime is found" not in line)
    assert line.startswith(f"megatron-paint: error: Cannot write {run}/checkpoints/step_000004: ")
