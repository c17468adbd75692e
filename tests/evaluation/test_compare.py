"""The comparison of two evaluations, by the command and by files."""

import json
import shutil

import pytest

from megatron_paint.cli.main import main
from megatron_paint.evaluation.compare import compare_files


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """Makes evaluations of 20 problems with 2 samples: `low` is right on 5, `high` on 15, and others."""
    folder = tmp_path_factory.mktemp("evaluated")
    problems = [{"id": f"p{i}", "problem": "?", "answer": str(i)} for i in range(20)]
    write(folder / "set.jsonl", problems)
    write(folder / "part.jsonl", problems[:10])
    for name, right, benchmark in (("low", 5, "set"), ("high", 15, "set"), ("part", 5, "part"), ("none", 0, "set")):
        rows = [
            {"id": f"p{i}", "response": f"\\boxed{{{i if i < right else 'no'}}}"}
            for i in range(20 if benchmark == "set" else 10)
            for _ in range(2)
        ]
        write(folder / f"{name}-responses.jsonl", rows)
        options = ("--benchmarks", str(folder / f"{benchmark}.jsonl"), "--out", str(folder / name), "--quiet")
        assert main(["evaluate", "--responses", str(folder / f"{name}-responses.jsonl"), *options]) == 0
    return folder


def test_compare(evaluated, tmp_path, capsys):
    """Ten of twenty problems change from wrong to right: +50 points. p is the chance of ten equal signs."""
    (row,) = compare_files(evaluated / "low", evaluated / "high" / "set.json")
    assert (row.a, row.b, row.problems) == (0.25, 0.75, 20)
    assert row.difference.mean == pytest.approx(0.5)
    assert 0.2 < row.difference.low < 0.4 < 0.6 < row.difference.high < 0.8
    assert row.p_value == 2 / 2**10
    (same,) = compare_files(evaluated / "low", evaluated / "low")
    assert (same.difference.mean, same.p_value) == (0.0, 1.0)
    out = tmp_path / "table.md"
    assert main(["evaluate", "compare", str(evaluated / "none"), str(evaluated / "high"), "--out", str(out)]) == 0
    assert "< 0.0001" in capsys.readouterr().out
    assert "| set | 20 | 0.0 | 75.0 | +75.0 [" in out.read_text()
    assert main(["compare", str(evaluated / "low"), str(evaluated / "high"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["p_value"] == row.p_value


def test_what_cannot_be_compared(evaluated, tmp_path, capsys):
    assert main(["compare", str(evaluated / "low"), str(evaluated / "part")]) == 2
    assert "Only evaluations on the same benchmarks can be compared" in capsys.readouterr().err
    renamed = json.loads((evaluated / "part" / "part.json").read_text()) | {"benchmark": "set"}
    (tmp_path / "set.json").write_text(json.dumps(renamed))
    assert main(["compare", str(evaluated / "low"), str(tmp_path / "set.json")]) == 2
    assert "only evaluations on the same problems can be compared" in capsys.readouterr().err
    for content in ("{", '{"answers": []}', "[" * 100_000, json.dumps(renamed | {"answers": []})):
        (tmp_path / "set.json").write_text(content)
        assert main(["compare", str(evaluated / "low"), str(tmp_path / "set.json")]) == 2
        assert "cannot read the evaluation" in capsys.readouterr().err
    for content in ("{", "[]", '{"benchmarks": 3}', "{}"):
        (tmp_path / "summary.json").write_text(content)
        assert main(["compare", str(evaluated / "low"), str(tmp_path)]) == 2
        assert "has no evaluation" in capsys.readouterr().err


def test_different_sampling_settings_are_reported(evaluated, tmp_path, capsys):
    for name, temperature in (("a", 1.0), ("b", 0.6)):
        shutil.copytree(evaluated / "low", tmp_path / name)
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        summary["sampled_with"] = {"model": name, "temperature": temperature, "seed": 1}
        (tmp_path / name / "summary.json").write_text(json.dumps(summary))
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert "the two were sampled otherwise: temperature 1.0 and 0.6" in capsys.readouterr().err
