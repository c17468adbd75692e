"""Evaluations over several domains: accuracy of each, scores, errors of graders, and what the summary shows."""

import json
import math
from dataclasses import replace

import pytest

from megatron_paint.evaluation.statistics import build_report, domains_in, majority_score
from megatron_paint.evaluation.summary import (
    Evaluated,
    domain_text,
    error_warning,
    markdown,
    read_report,
    write_summary,
)
from megatron_paint.records import Asked, Graded

OUTCOMES = {"r": "right", "w": "wrong", "e": "error", "t": "timeout", "n": "no_answer"}


def graded(problem, marks, *, domain="math", scores=None, extracted="x"):
    return [
        Graded(
            problem_id=problem,
            sample_index=index,
            response_text="",
            num_tokens=5,
            finished=True,
            outcome=OUTCOMES[mark],
            extracted=extracted,
            domain=domain,
            score=scores[index] if scores else None,
            error="ValueError: x" if mark == "e" else "",
        )
        for index, mark in enumerate(marks)
    ]


def several():
    answers = (
        graded("a", "rw") + graded("b", "rr") + graded("c", "wn", domain="code") + graded("d", "re", domain="code")
    )
    return build_report(3, "mixed", [*answers, *graded("e", "wt", domain="text")])


def test_accuracy_by_domain():
    metrics = several().metrics
    assert metrics["avg"] == pytest.approx(4 / 10)
    assert domains_in(metrics) == ("math", "code", "text")
    assert {name: metrics[f"domain/{name}/avg"] for name in domains_in(metrics)} == {
        "math": 0.75,
        "code": 0.25,
        "text": 0,
    }
    assert {name: metrics[f"domain/{name}/problems"] for name in domains_in(metrics)} == {
        "math": 2,
        "code": 2,
        "text": 1,
    }
    for name in domains_in(metrics):
        low, high = metrics[f"domain/{name}/avg/low"], metrics[f"domain/{name}/avg/high"]
        assert 0 <= low <= metrics[f"domain/{name}/avg"] <= high <= 1
    assert metrics["domain/text/avg/high"] == pytest.approx(
        1 - 0.025
    )  # one problem, nothing right: Clopper and Pearson
    assert (metrics["errors"], metrics["timeouts"]) == (1, 1)


def test_one_domain_has_no_second_accuracy():
    for domain in ("math", "code"):
        report = build_report(0, "one", graded("a", "rw", domain=domain))
        assert domains_in(report.metrics) == ()
        assert domain_text(report) == ""
        assert not any(name.startswith("domain/") for name in report.metrics)


def test_scores():
    answers = graded("a", "rw", scores=[1.0, 0.25], domain="code") + graded(
        "b", "ew", scores=[None, 0.5], domain="code"
    )
    assert build_report(0, "x", answers).metrics["score"] == pytest.approx((1 + 0.25 + 0 + 0.5) / 4)
    mixed = answers + graded("c", "rw")
    assert build_report(0, "x", mixed).metrics["score"] == pytest.approx((1 + 0.25 + 0 + 0.5 + 1 + 0) / 6)
    assert "score" not in build_report(0, "x", graded("c", "rw")).metrics


def test_votes():
    """Wrong answers that nothing distinguishes do not vote together, and failures of a grader do not vote."""
    assert majority_score(graded("a", "rrwww", extracted=None)) == 1
    assert majority_score(graded("a", "rrwww", extracted="7")) == 0
    assert majority_score(graded("a", "reeee", extracted=None)) == 1
    assert majority_score(graded("a", "eeee", extracted=None)) == 0


def test_what_is_written_and_printed(tmp_path):
    report = several()
    evaluated = Evaluated(model="m", reports=(report,), sampled_with={})
    text = markdown(evaluated)
    assert "| benchmark | domain | problems | Avg@n | interval |" in text
    assert "| mixed | math | 2 | 75.0 | " in text
    assert "| mixed | text | 1 | 0.0 | 0.0 to 97.5 |" in text
    warning = (
        "mixed: 1 of 10 answers has no verdict and counts as not right, because their grader failed. The first is of "
        "problem 'd': ValueError: x"
    )
    assert error_warning(report) == warning
    assert f"Warning: {warning}." in text
    assert domain_text(report) == "math 75.0 %, code 25.0 %, text 0.0 %"
    write_summary(tmp_path, evaluated)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["benchmarks"]["mixed"]["domain/code/avg"] == 0.25
    assert read_report(tmp_path / "mixed.json") == report
    asked = replace(report, problems=(Asked(id="a", problem="4+1?", answer="5"),))
    write_summary(tmp_path, replace(evaluated, reports=(asked,)))
    assert read_report(tmp_path / "mixed.json") == asked


def test_reports_of_an_earlier_version_are_read(tmp_path):
    report = build_report(0, "old", graded("a", "rw"))
    content = json.loads(json.dumps({**vars_of(report), "answers": [vars_of(one) for one in report.answers]}))
    del content["problems"]
    for answer in content["answers"]:
        for name in ("domain", "score", "error"):
            del answer[name]
    del content["metrics"]["errors"]
    (tmp_path / "old.json").write_text(json.dumps(content))
    found = read_report(tmp_path / "old.json")
    assert found.answers == report.answers
    assert math.isclose(found.metrics["avg"], 0.5)
    assert "| 0 | 5 |" in markdown(Evaluated(model="m", reports=(found,), sampled_with={}))


def vars_of(record):
    return {name: getattr(record, name) for name in record.__dataclass_fields__}
