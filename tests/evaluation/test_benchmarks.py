"""Benchmarks by name and by file, and the mistakes in their names."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_paint.base.errors import UserError
from megatron_paint.config.settings import EvaluationSettings
from megatron_paint.evaluation.benchmarks import NAMED, load_benchmarks

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the shared data folder is not beside the repository")

PROBLEMS = [{"id": "a", "problem": "p", "answer": "1"}, {"id": "b", "problem": "p", "answer": "2"}]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_named_benchmarks(monkeypatch):
    """The calls of `datasets`, and the answers as the data sets have them."""
    asked = []
    rows = {
        "HuggingFaceH4/aime_2024": [{"id": 60, "problem": "p", "answer": "204", "solution": "s"}],
        "yentinglin/aime_2025": [{"id": "0", "problem": "p", "answer": "70", "solution": "70"}],
        "MathArena/hmmt_feb_2025": [{"problem_idx": 1, "problem": "p", "answer": "103"}],
        "HuggingFaceH4/MATH-500": [{"unique_id": "t/1.json", "problem": "p", "answer": "\\pi", "solution": "s"}],
        "openai/gsm8k": [{"question": "q", "answer": "5 + 5 = <<5+5=10>>10\n#### 1,010"}],
    }

    def load_dataset(name, configuration, *, split):
        asked.append((name, configuration, split))
        return rows[name]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    found = load_benchmarks(["aime24", "aime25", "hmmt25", "math500", "gsm8k"], EvaluationSettings())
    assert [(b.name, b.problems[0].id, b.problems[0].answer) for b in found] == [
        ("aime24", "60", "204"),
        ("aime25", "0", "70"),
        ("hmmt25", "1", "103"),
        ("math500", "t/1.json", "\\pi"),
        ("gsm8k", "gsm8k:main:1", "1010"),
    ]
    assert asked[-1] == ("openai/gsm8k", "main", "test")
    rows["openai/gsm8k"] = [{"question": "q", "answer": "10"}]
    with pytest.raises(UserError, match="the answer has no '####'"):
        load_benchmarks(["gsm8k"], EvaluationSettings())
    assert set(NAMED) == {"aime24", "aime25", "hmmt25", "math500", "gsm8k"}


@needs_data
def test_benchmark_files():
    files = ["aime2024", "aime2025", "hmmt_feb_2025", "math500", "gsm8k_test"]
    found = load_benchmarks([str(DATA / f"{name}.jsonl") for name in files], EvaluationSettings())
    assert {one.name: len(one.problems) for one in found} == dict(zip(files, (30, 30, 30, 500, 1319), strict=True))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["aime2"], "'aime2' is neither a known benchmark nor a file.*Did you mean 'aime2[45]'"),
        (["nothing.jsonl"], "there is no file nothing.jsonl"),
        (["{p}", "{p}"], "has 'p' twice"),
        (["{s}"], "would overwrite the summary"),
    ],
)
def test_unknown_benchmarks(names, message, tmp_path):
    path, summary = (write(tmp_path / f"{name}.jsonl", PROBLEMS) for name in ("p", "summary"))
    with pytest.raises(UserError, match=message):
        load_benchmarks([name.format(p=path, s=summary) for name in names], EvaluationSettings())
