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
    printed, written = capsys.readouterr().out, out.read_text()
    assert "< 0.0001" in printed
    assert "| set | 20 | 0.0 | 75.0 | +75.0 [" in written
    for name, folder in (("A", "none"), ("B", "high")):  # what was compared, and how many answers to a problem
        line = f"{name} = {evaluated / folder}, model {evaluated / folder}-responses.jsonl"
        assert f"{line}\n" in printed
        assert f"* {line}\n" in written
    assert row.samples == (2, 2)
    assert written.rstrip().endswith("| 2 |")
    assert main(["compare", str(evaluated / "low"), str(evaluated / "high"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["p_value"] == row.p_value


def test_what_cannot_be_compared(evaluated, tmp_path, capsys):
    assert main(["compare", str(evaluated / "low"), str(evaluated / "part")]) == 2
    assert "Only evaluations on the same benchmarks can be compared" in capsys.readouterr().err
    renamed = json.loads((evaluated / "part" / "part.json").read_text()) | {"benchmark": "set"}
    (tmp_path / "set.json").write_text(json.dumps(renamed))
    assert main(["compare", str(evaluated / "low"), str(tmp_path / "set.json")]) == 2
    assert "only evaluations on the same problems can be compared" in capsys.readouterr().err
    assert main(["compare", str(evaluated / "low"), str(tmp_path / "none")]) == 2
    assert f"there is no evaluation {tmp_path / 'none'}: give the folder" in capsys.readouterr().err
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


def test_answers_that_are_cut_off_are_reported(evaluated, tmp_path, capsys):
    """5 of 40 answers are cut off, which is 12.5 %; 4 are exactly a tenth. 0.832 is 0.025^(1/20)."""
    for cut in (5, 4):
        rows = [
            {"id": f"p{i // 2}", "response": f"\\boxed{{{i // 2}}}", "finished": i >= cut, "num_tokens": 7}
            for i in range(40)
        ]
        path = write(tmp_path / f"cut{cut}.jsonl", rows)
        options = ("--benchmarks", str(evaluated / "set.jsonl"), "--out", str(tmp_path / f"out{cut}"))
        assert main(["evaluate", "--responses", str(path), *options]) == 0
        printed, written = capsys.readouterr().out, (tmp_path / f"out{cut}" / "summary.md").read_text()
        cells = [cell.strip() for line in printed.splitlines() if "Avg@2" in line for cell in line.split("│")]
        assert cells[1:-1] == ["set", "Avg@2 100.0 % [83.2, 100.0]", "-", "7", "2", f"{100 * cut / 40:.1f} %"]
        assert f"model: {path}" in printed.replace("\n", "")
        for text in (printed, written):
            assert ("set: 12 % of the answers are cut off at the length limit" in text) == (cut == 5)
