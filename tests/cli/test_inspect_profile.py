"""`megatron-paint inspect profile`: tables of phases and operators."""

import json

import pytest

from megatron_paint.cli.main import main
from megatron_paint.run.folder import RunFolder
from megatron_paint.run.timeline import RankTimes, Span, Timeline
from megatron_paint.run.trace import Operator, TraceSummary

MM, ADD = (
    Operator(name="aten::mm", calls=1200, seconds=1.5),
    Operator(name="aten::add[float]" + "x" * 90, calls=3, seconds=0.25),
)
KERNEL = Operator(name="gemm", calls=7, seconds=1.0)


@pytest.fixture
def run(tmp_path):
    line = Timeline()
    for step in (2, 5):
        ranks = []
        for rank, student in ((0, 3.0), (1, 2.0)):
            operators = TraceSummary(cpu={"student": [MM, ADD]}, gpu={"student": [KERNEL]}) if rank else None
            spans = (Span(phase="student", start=1.0, seconds=student),)
            ranks.append(
                RankTimes(step=step, rank=rank, host="h", start=1.0, seconds=4.0, spans=spans, operators=operators)
            )
        line = line.with_step(ranks)
    folder = RunFolder(tmp_path)
    folder.profile.mkdir()
    line.write(folder.timeline_file)
    return tmp_path


def rows(text):
    """The cells of each row of a table."""
    lines = (line for line in text.splitlines() if line.startswith("│"))
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def test_tables(run, capsys):
    assert main(["inspect", "profile", str(run), "--step", "5"]) == 0
    text = capsys.readouterr().out
    assert "Step 5 with what follows it: 4.000 s on 2 ranks" in text
    assert "Step 5, rank 1: time in operators" in text
    assert rows(text) == [
        ["student", "3.0000", "0", "2.0000", "1", "62.5 %"],
        ["other", "2.0000", "1", "1.0000", "0", "37.5 %"],
        ["student", "CPU", "aten::mm", "1,200", "1.5000", "75.0 %"],
        ["", "CPU", "aten::add[float]" + "x" * 41 + "...", "3", "0.2500", "12.5 %"],
        ["", "GPU", "gemm", "7", "1.0000", "50.0 %"],
    ]


def test_all_steps_and_the_largest_operator(run, capsys):
    assert main(["inspect", "profile", str(run), "--top", "1"]) == 0
    text = capsys.readouterr().out
    assert [name for name in ("Step 2 with", "Step 5 with") if name in text] == ["Step 2 with", "Step 5 with"]
    assert sum("aten::" in line for line in text.splitlines()) == 2


def test_json(run, capsys):
    assert main(["inspect", "profile", str(run), "--step", "2", "--json", "--top", "1"]) == 0
    (step,) = json.loads(capsys.readouterr().out)
    assert (step["step"], step["ranks"], step["operators_of_rank"]) == (2, 2, 1)
    assert [(row["phase"], row["slowest"], row["share"]) for row in step["phases"]] == [
        ("student", 3.0, 0.625),
        ("other", 2.0, 0.375),
    ]
    assert step["operators"]["cpu"] == {"student": [{"name": "aten::mm", "calls": 1200, "seconds": 1.5}]}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--step", "3"], "--step=3 was not profiled; the profiled steps are 2, 5"),
        (["--rank", "0"], "--rank=0 has no trace of step 2; ranks with one: 1"),
        (["--top", "0"], "--top=0 must be at least 1"),
    ],
)
def test_what_does_not_exist(run, capsys, options, says):
    assert main(["inspect", "profile", str(run), *options]) == 2
    assert capsys.readouterr().err == f"megatron-paint: error: {says}\n"


def test_a_run_without_a_profile(tmp_path, capsys):
    assert main(["inspect", "profile", str(tmp_path)]) == 2
    assert "no step was profiled. Set run.profile" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ((), "seconds", "a"),
        ((), "rank", None),
        ((), "operators", [1]),
        (("spans", 0), "seconds", "a"),
        (("spans", 0), "phase", 3),
        (("operators", "cpu", "student", 0), "calls", "x"),
        (("operators", "gpu", "student", 0), "name", None),
    ],
)
def test_a_damaged_file_is_one_line(run, capsys, part, key, value):
    file = RunFolder(run).timeline_file
    tree = json.loads(file.read_text())
    damaged = tree["steps"][1]
    for name in part:
        damaged = damaged[name]
    assert key in damaged
    damaged[key] = value
    file.write_text(json.dumps(tree))
    assert main(["inspect", "profile", str(run)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"megatron-paint: error: Cannot read {file}: ")
    assert err.count("\n") == 1
