"""What the console says, as plain text and as JSON."""

import ast
import io
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from megatron_paint.evaluation.statistics import build_report
from megatron_paint.records import Graded, StepReport
from megatron_paint.run.console import Progress, duration
from megatron_paint.run.console_log import ConsoleLog


def graded(problem, outcome, index=0):
    return Graded(
        problem_id=problem,
        sample_index=index,
        response_text="",
        num_tokens=100,
        finished=True,
        outcome=outcome,
        extracted=None,
    )


BEFORE = build_report(0, "tiny", [graded("a", "wrong"), graded("b", "right")], greedy=[graded("a", "right")])
AFTER = build_report(4, "tiny", [graded("a", "right"), graded("b", "right")], greedy=[graded("a", "right")])


def step(number, **changes):
    values = {"step": number, "loss": 0.125, "overlap/mean": 0.4, "reveal/mean": 0.58, "tokens_per_second": 1234.5}
    values |= {"response/length_mean": 1023.4, "response/truncated_share": 0.25, "grad_norm": 0.03123}
    return StepReport(step=number, metrics={**values, **changes}, samples=(), scores=(), seconds=2.345)


class Clock:
    """Ten seconds a step."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 10.0
        return self.now


def run(mode, *, terminal=False):
    """A short run of four steps; what it printed."""
    console = Console(file=io.StringIO(), force_terminal=terminal, highlight=False, width=120)
    progress = Progress(mode, steps=4, console=console, clock=Clock())
    progress.note("32 problems a step [bold]", problems=32)
    progress.evaluation(BEFORE)
    progress.step(replace(step(1), warnings=("clip/share [above]",)))
    progress.step(step(2, **{"overlap/mean": math.nan, "reveal/mean": math.nan}))
    progress.evaluation(AFTER)
    progress.step(step(3))
    progress.end(before=[BEFORE], after=[AFTER], folder="runs/x")
    return console.file.getvalue()


def test_normal_has_a_line_for_each_step():
    lines = run("normal").splitlines()
    assert lines[0] == "32 problems a step [bold]"
    assert lines[1].startswith("evaluation at step 0 on tiny: Avg@1 50.0 % [0.0, 100.0]")
    assert lines[2] == (
        "step 1/4  loss 0.1250  overlap 0.40  reveal 0.58  length 1,023  truncated 25%  grad 0.0312  2.35 s/step  "
        "1,234 tokens/s  0:00:30 left"
    )
    assert lines[3] == "warning: clip/share [above]"
    assert lines[4] == (
        "step 2/4  loss 0.1250  length 1,023  truncated 25%  grad 0.0312  2.35 s/step  1,234 tokens/s  0:00:20 left"
    )
    assert "accuracy" not in lines[6], "that of an earlier step"
    assert lines[-1] == "Results: runs/x"


def test_the_table_at_the_end_compares_before_and_after():
    table = run("normal")
    assert "Avg@1 50.0 % [0.0, 100.0]" in table
    assert "Avg@1 100.0 % [15.8, 100.0]" in table  # two of two: 0.158 = 0.025^(1/2)
    assert "+50.0 [+0.0, +100.0]" in table
    rows = [[cell.strip() for cell in line.split("│")] for line in table.splitlines() if "tiny" in line and "│" in line]
    assert [row[5:7] for row in rows] == [["100.0", "100"], ["100.0", "100"]]  # greedy, mean length


@pytest.mark.parametrize("mode", ["normal", "json"])
def test_evaluations_of_other_problems_have_no_difference(mode):
    """As after run.allow_changes=[evaluation.limit]."""
    console = Console(file=io.StringIO(), width=120)
    fewer = build_report(4, "tiny", [graded("a", "right")], greedy=[graded("a", "right")])
    Progress(mode, steps=4, console=console).end(before=[BEFORE], after=[fewer])
    said = console.file.getvalue()
    if mode == "json":
        assert json.loads(said)["differences"] == {}
        assert json.loads(said)["after"]["tiny"]["avg"] == 1.0
    else:
        assert [line.split("│")[4].strip() for line in said.splitlines() if "step 4" in line] == ["other problems"]


def test_quiet_warns_and_ends_with_the_table():
    said = run("quiet")
    assert said.splitlines()[0] == "warning: clip/share [above]"
    assert "step 1/4" not in said
    assert "evaluation at" not in said
    assert "+50.0 [+0.0, +100.0]" in said


def test_json_is_one_object_a_line():
    events = [json.loads(line) for line in run("json", terminal=True).splitlines()]
    kinds = ["note", "evaluation", "step", "warning", "step", "evaluation", "step", "end"]
    assert [event["event"] for event in events] == kinds
    assert events[0]["problems"] == 32
    assert events[2]["loss"] == 0.125
    assert events[2]["steps"] == 4
    assert events[2]["seconds_left"] == 30.0
    assert events[4]["overlap/mean"] is None
    assert events[-1]["differences"]["tiny"] == [0.5, 0.0, 1.0]
    assert events[-1]["after"]["tiny"]["avg"] == 1.0


def test_silent_says_nothing():
    assert run("silent") == ""


def test_a_run_without_evaluation_ends_without_a_table():
    console = Console(file=io.StringIO())
    Progress("normal", steps=1, console=console).end(folder="runs/x")
    assert console.file.getvalue() == "Results: runs/x\n"


def test_a_long_line_is_not_wrapped_in_a_log_file():
    console = Console(file=io.StringIO(), width=20)
    Progress("normal", steps=4, console=console, clock=Clock()).step(step(1))
    assert len(console.file.getvalue().splitlines()) == 1


def test_time_left_follows_the_recent_pace():
    times = iter([0.0] + [100.0 * k for k in range(1, 6)] + [500.0 + k for k in range(1, 31)])
    progress = Progress("silent", steps=100, clock=lambda: next(times))
    for number in range(1, 36):
        progress.step(step(number))
    assert progress.seconds_left(35) == pytest.approx(65.0)  # the slow first steps are forgotten
    assert progress.seconds_left(101) == 0.0


def test_duration():
    assert duration(3723.4) == "1:02:03"
    assert duration(0) == "0:00:00"
    assert duration(90000) == "25:00:00"


def test_the_table_names_n_and_what_was_cut_off():
    cut = build_report(0, "tiny", [replace(graded("a", "wrong", i), finished=i > 0) for i in range(4)])
    console = Console(file=io.StringIO(), width=120)
    progress = Progress("normal", steps=1, console=console)
    progress.evaluation(cut)
    assert "warning: tiny: 25 % of the answers are cut off at the length limit" in console.file.getvalue()
    progress.end(after=[cut], folder="out", model="models/[mine]")
    rows = [line.split("│") for line in console.file.getvalue().splitlines() if "Avg@4" in line and "│" in line]
    assert [cell.strip() for cell in rows[0][-3:-1]] == ["4", "25.0 %"]
    assert "model: models/[mine]" in console.file.getvalue()


def test_colons_stay_colons(tmp_path, capsys):
    progress = Progress("normal", steps=1, log=ConsoleLog())
    progress.note("the answer is :100:, of :key: runs/:smile:")
    with progress.logging(tmp_path, ["train", ":x:"]):
        progress.end(after=[replace(BEFORE, benchmark=":warning:")], folder=":fire:")
    for said in (capsys.readouterr().out, (tmp_path / "console.log").read_text()):
        assert "the answer is :100:, of :key: runs/:smile:" in said
        assert "│ :warning: │" in said
        assert "Results: :fire:" in said


def test_every_console_leaves_colons_alone():
    """rich writes emoji in place of :100: and :key: otherwise."""
    made = 0
    for file in sorted((Path(__file__).parents[2] / "megatron_paint").rglob("*.py")):
        text = file.read_text()
        if "from rich.console import" not in text:
            continue
        for call in ast.walk(ast.parse(text)):
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "Console":
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
                assert given.get("emoji") == "False", f"{file}:{call.lineno}"
                made += 1
    assert made >= 7
