"""Benchmarks by name and by file, and the mistakes in their names."""

import gzip
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_paint.base.errors import UserError
from megatron_paint.config.settings import ColumnSettings, EvaluationSettings
from megatron_paint.evaluation.benchmarks import NAMED, benchmark_name, load_benchmarks

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


def test_data_sets_by_name(monkeypatch):
    """What `data.train` takes: OWNER/NAME, with a configuration and a version in the name, and a name alone."""
    asked = []

    def load_dataset(name, configuration, *, split):
        asked.append((name, configuration, split))
        return [{"id": name, "problem": f"p of {name}", "answer": "1"}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    names = ["owner/set-v1.5", "owner/other:algebra", "squad"]
    found = load_benchmarks(names, EvaluationSettings(split="dev"))
    assert [(one.name, one.problems[0].id) for one in found] == [
        ("set-v1.5", "owner/set-v1.5"),
        ("other_algebra", "owner/other"),
        ("squad", "squad"),
    ]
    assert asked == [("owner/set-v1.5", None, "dev"), ("owner/other", "algebra", "dev"), ("squad", None, "dev")]
    near = load_benchmarks(["aime2"], EvaluationSettings(format="datasets"))
    assert near[0].problems[0].id == "aime2"


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("gsm8k", "gsm8k"),
        ("runs/held_out.jsonl", "held_out"),
        ("a/held.out.json.gz", "held.out"),
        ("owner/set-v1.5", "set-v1.5"),
        ("owner/set:main", "set_main"),
    ],
)
def test_names_in_reports(source, name):
    assert benchmark_name(source) == name


def test_a_split_that_a_data_set_does_not_have(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "train.jsonl", PROBLEMS)
    with pytest.raises(UserError, match=r"evaluation\.problems: .*its split 'test'.*Set evaluation\.split"):
        load_benchmarks([str(tmp_path / "set")], EvaluationSettings())
    found = load_benchmarks([str(tmp_path / "set")], EvaluationSettings(split="train"))
    assert (found[0].name, [problem.id for problem in found[0].problems]) == ("set", ["a", "b"])


def test_files_of_other_formats(tmp_path):
    """The rows of GSM8K in a compressed CSV file: the answer is what follows the mark."""
    text = 'question,answer\n"How many?","2*1250=<<2*1250=2500>>2500.\n#### 2,500"\n'
    (tmp_path / "raw.csv.gz").write_bytes(gzip.compress(text.encode()))
    settings = EvaluationSettings(columns=ColumnSettings(problem="question"))
    found = load_benchmarks([str(tmp_path / "raw.csv.gz")], settings)[0]
    assert (found.name, found.problems[0].id, found.problems[0].answer) == ("raw", "raw:2", "2500")
    assert found.notes[-1].endswith("1 of 1 answer ends in '#### RESULT'; the result is the answer")


def test_repeated_problems_are_counted(tmp_path):
    found = load_benchmarks([str(write(tmp_path / "p.jsonl", PROBLEMS))], EvaluationSettings())[0]
    assert found.warnings[0].startswith("evaluation.problems: 1 of 2 problems repeats the text of an earlier one")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["aime2"],
            r"^--benchmarks.*: 'aime2' is neither a known benchmark nor a file.*Did you mean 'aime2[45]'",
        ),
        (["nothing.jsonl"], "there is no file nothing.jsonl"),
        (["{p}", "{p}"], "has 'p' twice"),
        (["{s}"], "would overwrite the summary"),
    ],
)
def test_unknown_benchmarks(names, message, tmp_path):
    path, summary = (write(tmp_path / f"{name}.jsonl", PROBLEMS) for name in ("p", "summary"))
    with pytest.raises(UserError, match=message):
        load_benchmarks([name.format(p=path, s=summary) for name in names], EvaluationSettings())
