"""Grading of recorded responses by the evaluate command: real rollouts checked by hand, and bad response files."""

import json
import math
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from megatron_paint.cli.main import main
from megatron_paint.evaluation.summary import read_reports

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the shared data folder is not beside the repository")

# Read by a person: the content of the last box, and whether it is the reference's answer. The reference of 0003 is
# damaged in its source ("4:30p.." for 4:30 p.m.). A person accepts the response, but the grader cannot.
BY_HAND = {
    "0003-s0": (r"4:30 \text{ p.m.}", False),
    "0006-s7": (r"\frac{5}{16}", False),
    "0028-s1": ("11", False),
    "0037-s4": (r"1 \frac{1}{9}", False),
    "0054-s6": ("13", False),
    "0070-s0": ("19", False),
    "0072-s1": ("9998", False),
    "0072-s7": ("10000", True),  # the answer is 10{,}000; the grader of the source counted it as wrong
    "0084-s4": ("40", False),
    "0000-s0": ("420", True),
    "0010-s5": ("48", True),
    "0020-s1": ("76", True),
    "0029-s7": (r"\frac{11}{13}", True),
    "0039-s1": ("1020", True),
    "0048-s1": ("6", True),
    "0058-s0": ("12", True),
    "0067-s4": ("8", True),
    "0078-s1": ("800", True),
    "0089-s2": ("5", True),
    "0003-s6": (r"4:30 \text{ p.m.}", False),
}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Grades 100 problems with 8 real rollouts each. Returns the folder of the results and the rows."""
    folder = tmp_path_factory.mktemp("recorded")
    rows = [json.loads(line) for line in (DATA / "rollouts_qwen25math_math100x8.jsonl").read_text().splitlines()]
    groups = defaultdict(list)
    for row in rows:
        groups[row["id"].rpartition("-s")[0]].append(row)
    problems = [{"id": id, "problem": g[0]["problem"], "answer": g[0]["answer"]} for id, g in groups.items()]
    responses = [
        {"id": id, "sample": int(row["id"].rpartition("-s")[2]), "response": row["rollout"]}
        for id, group in groups.items()
        for row in group
    ]
    write(folder / "math100.jsonl", problems)
    write(folder / "responses.jsonl", responses)
    assert grade(folder) == 0
    return folder, rows


def grade(folder, *arguments, responses="responses.jsonl"):
    options = ("--benchmarks", str(folder / "math100.jsonl"), "--out", str(folder / "out"), "--quiet")
    enough_time = "evaluation.grading_seconds=20"  # also on a busy machine
    return main(["evaluate", "--responses", str(folder / responses), *options, *arguments, enough_time])


@needs_data
def test_recorded_rollouts_by_hand(recorded):
    (report,) = read_reports(recorded[0] / "out")
    found = {f"{a.problem_id.removeprefix('qwen25math-math')}-s{a.sample_index}": a for a in report.answers}
    assert {name: (found[name].extracted, found[name].outcome == "right") for name in BY_HAND} == BY_HAND


@needs_data
def test_recorded_rollouts_agree_with_their_source(recorded):
    """Of 800 verdicts of another grader, at most 4 differ. Three are of answers with units or a damaged reference."""
    folder, rows = recorded
    (report,) = read_reports(folder / "out")
    theirs = {row["id"]: row["correct"] for row in rows}
    odd = [a for a in report.answers if (a.outcome == "right") != theirs[f"{a.problem_id}-s{a.sample_index}"]]
    assert len(odd) <= 4
    scores = np.array([sum(theirs[f"qwen25math-math{n:04d}-s{k}"] for k in range(8)) for n in range(100)])
    metrics = report.metrics
    assert metrics["avg"] == pytest.approx(scores.sum() / 800, abs=4 / 800)
    closed = np.mean([1 - math.comb(8 - c, 4) / math.comb(8, 4) for c in scores])
    assert metrics["pass@4"] == pytest.approx(closed, abs=0.01)
    assert metrics["no_answer_share"] == sum(not row["prediction"] for row in rows) / 800
    summary = json.loads((folder / "out" / "summary.json").read_text())
    assert summary["benchmarks"]["math100"]["avg"] == metrics["avg"]
    assert f"| math100 | 100 | {100 * metrics['avg']:.1f} (n = 8) |" in (folder / "out" / "summary.md").read_text()
    assert (folder / "out" / "summary.png").read_bytes().startswith(b"\x89PNG")


PROBLEMS = [{"id": "a", "problem": "p", "answer": "1"}, {"id": "b", "problem": "p", "answer": "2"}]
BOTH = [{"id": "a", "response": "\\boxed{1}"}, {"id": "b", "response": "\\boxed{1}"}]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (BOTH[:1], r"problem 'b' has 0 responses and others 1 \(1 such"),
        ([], r"--responses: \S*r\.jsonl has no responses"),
        ([*BOTH, {"id": "c", "response": ""}], r"r.jsonl:3: no benchmark has a problem 'c'"),
        ([*BOTH, {"id": "a", "sample": 0, "response": ""}], r"sample 0 of problem 'a' is in the file twice"),
        ([{"id": "a", "text": "1"}], r"r.jsonl:1: not an object"),
        ([{"id": "a", "response": 1}], r"response is a number, not text"),
        ([{"id": "a", "response": "", "sample": "1"}], r"whole numbers"),
        ([{"id": "a", "response": "", "sample": -1}], r"whole numbers from 0"),
        ([{"id": "a", "response": "", "num_tokens": True}], r"whole numbers from 0"),
    ],
)
def test_responses_that_cannot_be_graded(rows, message, tmp_path, capsys):
    problems, responses = write(tmp_path / "p.jsonl", PROBLEMS), write(tmp_path / "r.jsonl", rows)
    status = main(
        ["evaluate", "--responses", str(responses), "--benchmarks", str(problems), "--out", str(tmp_path / "o")]
    )
    assert status == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "o").exists()


def test_unknown_lengths(tmp_path, capsys):
    problems, responses = write(tmp_path / "p.jsonl", PROBLEMS), write(tmp_path / "r.jsonl", BOTH)
    line = ["evaluate", "--responses", str(responses), "--benchmarks", str(problems), "--out", str(tmp_path / "o")]
    assert main(line) == 0
    (report,) = read_reports(tmp_path / "o")
    assert report.metrics["avg"] == 0.5
    assert report.metrics["length_mean"] is None
    assert "Avg@1 50.0 %" in capsys.readouterr().out
    assert "nan" not in (tmp_path / "o" / "summary.md").read_text()


def test_responses_to_benchmarks_that_share_ids(tmp_path, capsys):
    for name in ("one", "two"):
        write(tmp_path / f"{name}.jsonl", PROBLEMS)
    responses = write(tmp_path / "r.jsonl", BOTH)
    both = f"{tmp_path / 'one.jsonl'},{tmp_path / 'two.jsonl'}"
    assert main(["evaluate", "--responses", str(responses), "--benchmarks", both, "--out", str(tmp_path / "o")]) == 2
    assert "one and two both have a problem 'a'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("cut", "other", "arguments", "outcome", "counted"),
    [
        ("<think>Perhaps \\boxed{1}, but", "\\boxed{2}", (), "no_answer", 1),
        ("<think>Perhaps \\boxed{1}, but", "\\boxed{2}", ("grading.box_in_thought=count",), "right", 1),
        ("Perhaps \\boxed{1}, but", "a thought</think> \\boxed{2}", (), "no_answer", 1),  # the prompts opened it
        ("Perhaps \\boxed{1}, but", "<think>a thought</think> \\boxed{2}", (), "right", 0),
    ],
)
def test_boxes_in_unfinished_thoughts(cut, other, arguments, outcome, counted, tmp_path):
    problems = write(tmp_path / "p.jsonl", PROBLEMS)
    rows = [{"id": "a", "response": cut, "finished": False}, {"id": "b", "response": other}]
    responses, out = write(tmp_path / "r.jsonl", rows), tmp_path / "o"
    line = ["evaluate", "--responses", str(responses), "--benchmarks", str(problems), "--out", str(out), *arguments]
    assert main(line) == 0
    (report,) = read_reports(out)
    assert {answer.problem_id: answer.outcome for answer in report.answers} == {"a": outcome, "b": "right"}
    assert report.answers[0].response_text == cut
    assert report.metrics["box_in_thought"] == counted
    header, _, row = [line for line in (out / "summary.md").read_text().splitlines() if line.startswith("|")]
    assert dict(zip(header.split(" | "), row.split(" | "), strict=True))["box in thought"] == str(counted)


STRAY = (
    "1 of 4 responses ends a thought that it never began (</think> without <think> before it), and 0 contain <think>. "
    "The prompts are assumed not to begin a thought"
)
MIXED = (
    "3 of 4 responses end a thought that they never began (</think> without <think> before it), and 1 contains "
    "<think>. The prompts are assumed not to begin a thought"
)
OPENED = (
    "3 of 4 responses end a thought that they never began (</think> without <think> before it), and 0 contain <think>. "
    "So the prompts are assumed to end with <think>: a response without </think> is an unfinished thought"
)


@pytest.mark.parametrize(
    ("responses", "right", "warning"),
    [
        (["\\boxed{1}", "\\boxed{1}", "\\boxed{1}", "</think>\\boxed{1}"], 4, STRAY),
        (["<think>a</think>\\boxed{1}", *["a</think>\\boxed{1}"] * 3], 4, MIXED),
        (["a \\boxed{1}", *["a</think>\\boxed{1}"] * 3], 3, OPENED),
        (["\\boxed{1}", *["<think>a</think>\\boxed{1}"] * 3], 4, ""),
    ],
)
def test_responses_that_end_a_thought_they_never_began(responses, right, warning, tmp_path, capsys):
    problems = write(tmp_path / "p.jsonl", PROBLEMS[:1])
    rows, out = [{"id": "a", "response": text} for text in responses], tmp_path / "o"
    line = ["--responses", str(write(tmp_path / "r.jsonl", rows)), "--benchmarks", str(problems), "--out", str(out)]
    assert main(["evaluate", *line]) == 0
    (report,) = read_reports(out)
    assert report.metrics["avg"] == right / 4
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("warning:") == bool(warning)
    assert warning in printed


def test_a_byte_order_mark(tmp_path):
    problems, responses = write(tmp_path / "p.jsonl", PROBLEMS), write(tmp_path / "r.jsonl", BOTH)
    responses.write_bytes(b"\xef\xbb\xbf" + responses.read_bytes())
    out = tmp_path / "o"
    assert main(["evaluate", "--responses", str(responses), "--benchmarks", str(problems), "--out", str(out)]) == 0
    assert read_reports(out)[0].metrics["avg"] == 0.5


@pytest.mark.parametrize(("of_problem", "of_response"), [(1, 1.0), (1.0, 1), ("1", 1.0)])
def test_ids_that_are_whole_numbers(of_problem, of_response, tmp_path):
    problems = write(tmp_path / "p.jsonl", [{"id": of_problem, "problem": "p", "answer": "1"}])
    responses = write(tmp_path / "r.jsonl", [{"id": of_response, "response": "\\boxed{1}"}])
    out = tmp_path / "o"
    assert main(["evaluate", "--responses", str(responses), "--benchmarks", str(problems), "--out", str(out)]) == 0
    assert read_reports(out)[0].metrics["avg"] == 1
