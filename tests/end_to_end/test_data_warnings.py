"""Dry runs on data as people publish it: what is accepted, and what is printed about it."""

import json
import sys
from types import SimpleNamespace

import pandas as pd
import pytest

from megatron_paint.cli.main import main
from megatron_paint.config.load import load_settings
from megatron_paint.launch.failure_notes import NOTES_FOLDER
from megatron_paint.models.qwen3.shape import read_shape
from megatron_paint.training.inputs import load_inputs, save_checked_problems
from tests.support import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def settings(model, tmp_path):
    return tiny.make_settings(tmp_path, model, tiny.make_problems(tmp_path / "problems.jsonl"))


def rows(folder):
    return [json.loads(line) for line in (folder / "problems.jsonl").read_text().splitlines()]


def dry_run(settings, *arguments):
    return main(["train", str(settings), *arguments, "--processes", "1", "--dry-run"])


def test_repeated_and_leaked_problems(settings, tmp_path, capsys):
    repeated = [{**row, "id": f"copy-{row['id']}-{number}"} for number in range(3) for row in rows(tmp_path)[2:]]
    (tmp_path / "train.json").write_text(json.dumps(repeated, indent=2))
    assert dry_run(settings, f"data.train={tmp_path}/train.json", "evaluation.limit=4") == 0
    printed = capsys.readouterr()
    text = " ".join((printed.out + printed.err).split())
    assert "18 training problems, 4 held-out problems" in text
    assert "warning: data.train: 12 of 18 problems repeat the text of an earlier one; 6 are different." in text
    assert "The first is 'copy-p2-1', which repeats 'copy-p2-0'." in text
    assert "warning: evaluation.problems: 2 of 4 held-out problems are also in data.train" in text
    assert "The first is 'p2', which is 'copy-p2-0' in data.train." in text


def test_grpo_needs_no_solutions(settings, tmp_path, capsys):
    """The Parquet layout of verl. PAINT refuses it, and names itself and the column."""
    table = [
        {
            "prompt": [{"role": "user", "content": row["problem"]}],
            "reward_model": {"ground_truth": row["answer"], "style": "rule"},
            "extra_info": {"index": row["id"]},
        }
        for row in rows(tmp_path)
    ]
    pd.DataFrame(table).to_parquet(tmp_path / "train.parquet")
    columns = "{problem: prompt, answer: reward_model.ground_truth, id: extra_info.index}"
    arguments = [f"data.train={tmp_path}/train.parquet", f"data.columns={columns}"]
    grpo = ["objective.name=grpo", "objective.grpo.samples_per_problem=2"]
    assert dry_run(settings, *arguments, *grpo) == 0
    assert "8 training problems" in capsys.readouterr().out
    assert dry_run(settings, *arguments) == 2
    error = capsys.readouterr().err
    assert "data.columns.solution: no row of " in error
    assert "objective.name: paint needs it." in error


def test_a_known_benchmark_in_a_run(settings, tmp_path, capsys, monkeypatch):
    found = [
        {"unique_id": f"t/{row['id']}", "problem": row["problem"], "answer": row["answer"]} for row in rows(tmp_path)
    ]
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda name, config, *, split: found))
    assert dry_run(settings, "evaluation.problems=math500", "evaluation.limit=5") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "8 training problems, 5 held-out problems" in text
    assert "5 of 5 held-out problems are also in data.train" in text
    assert "The first is 't/p0', which is 'p0' in data.train." in text


def test_rank_zero_gets_what_the_launcher_found(settings, tmp_path, monkeypatch):
    loaded = load_settings(settings)
    shape = read_shape(loaded.model.hf_path)
    inputs = load_inputs(loaded, shape)
    assert "3 of 3 held-out problems are also in data.train" in inputs.warnings[-1]
    save_checked_problems(inputs, tmp_path)
    monkeypatch.setenv(NOTES_FOLDER, str(tmp_path))
    (tmp_path / "problems.jsonl").unlink()
    again = load_inputs(loaded, shape)
    assert again.problems == inputs.problems
    assert (again.notes, again.warnings) == (inputs.notes, inputs.warnings)
