r"""Verdicts on boxes, by the kind of answer: cases.jsonl, and where math-verify's verdict differs."""

import json
import logging
import re
from pathlib import Path

import pytest

from megatron_paint.grading.grade import GradingPool, answers_agree

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CASES = [json.loads(line) for line in (HERE / "cases.jsonl").read_text(encoding="utf-8").splitlines()]
KINDS = sorted({case["about"] for case in CASES})
ROW = re.compile(
    r"\| (?P<about>[a-z -]+) \| (?P<verdict>right|wrong) \| `(?P<gold>[^`]*)` \| `(?P<boxed>[^`]*)` \| .+ \|"
)


@pytest.fixture(scope="module")
def pool():
    with GradingPool(workers=1, seconds=30.0) as shared:
        yield shared


@pytest.mark.parametrize("about", KINDS)
def test_verdicts(pool, about):
    cases = [case for case in CASES if case["about"] == about]
    grades = pool.grade([(rf"So it is $\boxed{{{case['boxed']}}}$.", case["gold"]) for case in cases])
    assert [case for case, grade in zip(cases, grades, strict=True) if grade.correct != case["right"]] == []


def test_every_kind_has_right_and_wrong_answers():
    found = {(case["about"], case["right"]) for case in CASES}
    assert found == {(about, right) for about in KINDS for right in (True, False)}


@pytest.mark.parametrize(
    "case", [case for case in CASES if case["about"] in ("choices", "units", "unicode")][::5], ids=str
)
def test_a_reference_solution_is_checked_by_the_same_rules(case):
    assert answers_agree(case["boxed"], case["gold"], seconds=30.0) is case["right"]


def math_verify_differs():
    """The cases that math-verify, used as its README shows, judges in another way than here."""
    from math_verify import parse, verify

    logging.disable(logging.CRITICAL)
    try:
        for case in CASES:
            gold = parse(rf"$\boxed{{{case['gold']}}}$", parsing_timeout=None)
            given = parse(rf"So it is $\boxed{{{case['boxed']}}}$.", parsing_timeout=None)
            if verify(gold, given, timeout_seconds=None) != case["right"]:
                yield case["about"], "right" if case["right"] else "wrong", case["gold"], case["boxed"]
    finally:
        logging.disable(logging.NOTSET)


def test_the_documentation_lists_what_math_verify_judges_in_another_way():
    differ = set(math_verify_differs())
    rows = [match.groups() for match in ROW.finditer((ROOT / "docs" / "algorithm.md").read_text(encoding="utf-8"))]
    assert {row[:2] for row in rows} == {case[:2] for case in differ}
    assert [row for row in rows if row not in differ] == []
