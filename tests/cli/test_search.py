"""`megatron-paint search`: its options, the plan of a dry run, and what it refuses before anything starts."""

import sys

import pytest

from megatron_paint.cli.main import main
from tests.search.spaces import ROOT, SETTINGS, write_space


@pytest.fixture
def command(tmp_path, monkeypatch):
    """The command on the small space, in the folder to which the examples' paths are relative."""
    monkeypatch.chdir(ROOT)
    return ["search", str(SETTINGS), str(write_space(tmp_path)), f"--out={tmp_path / 'out'}"]


def test_dry_run(command, tmp_path, capsys):
    assert main([*command, "--trials=10", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    # 3 evaluations (after 0, 2 and 4 steps) of 12 problems with 2 answers and a greedy one.
    for line in (
        f"search     10 trials in {tmp_path / 'out'}, 1 side by side; seed 1\n",
        "           optimizer.lr              0.0001 to 0.01 logarithmically\n",
        "trial 0    the given settings: optimizer.lr=0.001 objective.reveal.minimum=0.3 objective.loss.clip=null\n",
        "validation 12 problems of examples/search/validation.jsonl, by which trials are chosen and pruned\n",
        "test       240 problems of examples/quickstart/held_out.jsonl, after the last trial\n",
        "cost       a trial: at most 4 steps of 32 problems and 3 evaluations, 108 answers\n",
        "           all 10: at most 40 steps and 1,080 answers; pruned trials cost less (pruner: median)\n",
    ):
        assert line in printed
    assert not (tmp_path / "out").exists()
    assert main([*command, "evaluation.problems=null", "--dry-run"]) == 0
    assert "test       none: evaluation.problems is null\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trials=0"], "--trials must be at least 1, got 0"),
        (["--jobs=0"], "--jobs must be at least 1, got 0"),
        (["--seed=-1"], "--seed must be at least 0, got -1"),
        (["--trails=3"], "unknown argument '--trails=3': did you mean --trials?"),
        (["optimizer.lrr=1"], "unknown setting optimizer.lrr: did you mean optimizer.lr?"),
        (["--report-only"], "has no search: it has no search.yaml. Give the folder of a search"),
        (["evaluation.problems=examples/search/validation.jsonl"], "12 of 12 problems are in evaluation.problems="),
    ],
)
def test_refused(command, tmp_path, capsys, arguments, message):
    assert main([*command, *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else(command, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert main(command) == 2
    assert "is not empty and no search: it contains notes.txt. Give another folder" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]


def test_as_a_rank(command, monkeypatch, capsys):
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "h",
        "MASTER_PORT": "1",
        "LOCAL_RANK": "0",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(
        "megatron_paint.launch.print_once.print_once", lambda message, _: print(message, file=sys.stderr)
    )
    assert main(command) == 2
    assert "search starts the ranks of its trials itself" in capsys.readouterr().err


def test_without_optuna(command, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert main(command) == 2
    message = "search needs Optuna, which is not installed: pip install 'optuna>=5,<6' (or megatron-paint[search])"
    assert capsys.readouterr().err == f"megatron-paint: error: {message}\n"
