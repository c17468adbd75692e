"""Whether a run is finished, read off its folder: anything that differs, is missing or is damaged says no."""

import shutil

import pytest

from megatron_paint.cli.main import main
from megatron_paint.run.results import is_finished, shares_text, time_by_phase
from tests.support.finished import ROOT, SETTINGS, STEPS, make_finished_run, quickstart


@pytest.fixture
def folder(tmp_path):
    return make_finished_run(tmp_path / "run")


def test_a_finished_run(folder, tmp_path, monkeypatch):
    assert is_finished(folder, quickstart(folder.path))
    assert is_finished(folder, quickstart(folder.path, "run.resume=required"))
    monkeypatch.chdir(tmp_path)
    assert is_finished(folder, quickstart("run"))  # the same folder by another path


@pytest.mark.parametrize(
    "override",
    [
        "run.resume=never",
        "run.steps=3",
        "run.save_every=1",
        "optimizer.lr=2e-3",
        "megatron.sequence_parallel=false",
        "evaluation.samples=1",
        "evaluation.problems=null",
    ],
)
def test_other_settings(folder, override):
    assert not is_finished(folder, quickstart(folder.path, override))


@pytest.mark.parametrize(
    "name",
    [
        "config.yaml",
        "metrics.jsonl",
        f"samples/step_{STEPS:06d}.jsonl",
        "eval/step_000000.json",
        f"eval/step_{STEPS:06d}.json",
        f"hf/step_{STEPS:06d}",
        f"checkpoints/step_{STEPS:06d}",
        f"checkpoints/step_{STEPS:06d}/complete",
        f"checkpoints/step_{STEPS:06d}/checksums.json",
        f"checkpoints/step_{STEPS:06d}/__0_0.distcp",
    ],
)
def test_something_is_missing(folder, name):
    path = folder.path / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert not is_finished(folder, quickstart(folder.path))


@pytest.mark.parametrize("name", ["__0_0.distcp", "checksums.json"])
def test_a_damaged_checkpoint(folder, name):
    path = folder.checkpoint_folder(STEPS) / name
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)
    assert not is_finished(folder, quickstart(folder.path))


def test_no_run_at_all(tmp_path):
    assert not is_finished(make_finished_run(tmp_path / "run").__class__(tmp_path / "other"), quickstart(tmp_path))


class Started(Exception):
    """Ranks were to be started."""


def started(*_):
    raise Started


@pytest.mark.parametrize("mode", [[], ["--quiet"], ["--json"]], ids=lambda mode: "".join(mode) or "normal")
def test_the_same_command_again_starts_no_ranks(folder, monkeypatch, capsys, mode):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("megatron_paint.cli.ranks.run_here", started)
    monkeypatch.setattr("megatron_paint.launch.local.number_of_processes", started)
    monkeypatch.setattr("megatron_paint.cli.ranks.number_of_processes", started)
    command = ["train", SETTINGS, f"run.dir={folder.path}", f"run.steps={STEPS}", "--processes", "4", *mode]
    before = {path: path.stat().st_mtime_ns for path in folder.path.rglob("*")}
    assert main(command) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert str(folder.path) in printed.out
    if mode == ["--json"]:
        assert '"event": "end"' in printed.out
    else:
        assert "+75.0" in printed.out  # one of four answers was right, and now all are
    if not mode:
        assert "nothing is left to do" in printed.out
        assert f"\n  megatron-paint inspect samples {folder.path} {STEPS} " in printed.out
        assert f"\n  megatron-paint report {folder.path} " in printed.out
    assert {path: path.stat().st_mtime_ns for path in folder.path.rglob("*")} == before
    with pytest.raises(Started):
        main([*command, "optimizer.weight_decay=0.1"])


def test_the_time_of_all_steps_by_phase():
    lines = [
        {"step": 1, "num_tokens": 100, "tokens_per_second": 10.0, "time/rollout_s": 6.0, "time/student_s": 3.0},
        {"step": 2, "num_tokens": 100, "tokens_per_second": 10.0, "time/rollout_s": 5.0, "time/grade_s": None},
        {"step": 3, "skipped": "loss"},
    ]
    phases = time_by_phase(lines)
    assert phases == {"rollout": 11.0, "other": 6.0, "student": 3.0}
    assert shares_text("time of the steps", phases) == (
        "time of the steps: 0:00:20: rollout 0:00:11 (55%), other 0:00:06 (30%), student 0:00:03 (15%)"
    )
    assert time_by_phase([]) == {}
    assert shares_text("time", {"step": 0.0}) == "time: 0:00:00"
