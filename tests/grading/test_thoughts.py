r"""Boxes inside a thought that never ends, under both policies."""

import pytest

from megatron_paint.config.load import settings_of
from megatron_paint.grading.grade import GradingPool, Rules, grade
from megatron_paint.grading.thoughts import (
    answer_text,
    continued,
    ends_unbegun_thought,
    opened_by_prompt,
    unfinished_thought,
)

CUT = "<think>\nMaybe \\boxed{8}? Let me check again, since the"


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("no thought", None),
        ("<think>a</think>b", None),
        ("a</think>b", None),
        ("<think>a", 0),
        ("ab<think>c", 2),
        ("<think>a<think>b", 0),
        ("<think>a</think>b<think>c", 17),
    ],
)
def test_unfinished_thought(text, start):
    assert unfinished_thought(text) == start
    assert answer_text(text, "ignore") == text[:start]
    assert answer_text(text, "count") == text


@pytest.mark.parametrize(
    ("text", "ignored", "counted", "in_thought"),
    [
        (CUT, "no_answer", "right", True),
        ("<think>\\boxed{9}</think>It is \\boxed{8}", "right", "right", False),
        ("<think>\\boxed{8}</think>It is \\boxed{9}", "wrong", "wrong", False),
        ("<think>\\boxed{8}</think>It is eight", "right", "right", False),
        ("\\boxed{8} <think>or \\boxed{9}", "right", "wrong", True),
        ("<think>\\boxed{", "no_answer", "no_answer", False),
    ],
)
def test_both_policies(text, ignored, counted, in_thought):
    by_default = grade(text, answer="8")
    assert (by_default.outcome, by_default.box_in_thought) == (ignored, in_thought)
    other = grade(text, answer="8", rules=Rules(box_in_thought="count"))
    assert (other.outcome, other.box_in_thought) == (counted, in_thought)


def test_a_pool_has_its_own_rules():
    with GradingPool(workers=1, rules=Rules(box_in_thought="count")) as pool:
        assert pool.grade([(CUT, "8")])[0].correct
        assert not pool.grade([(CUT, "8")], rules=Rules())[0].correct


def test_the_setting():
    tree = {"model": {"hf_path": "m"}, "data": {"train": "p.jsonl"}, "run": {"dir": "r"}}
    assert settings_of(tree).grading.box_in_thought == "ignore"
    assert settings_of({**tree, "grading": {"box_in_thought": "count"}}).grading.box_in_thought == "count"


def test_a_prompt_that_opens_the_thought():
    assert continued("assistant\n<think>\n", "\\boxed{8}") == "<think>\\boxed{8}"
    assert continued("<think>\n\n</think>\n\n", "\\boxed{8}") == "\\boxed{8}"


@pytest.mark.parametrize(
    ("finished", "unfinished", "opened"),
    [
        (["b</think>c"], ["a"], True),
        (["b</think>c", "d</think>e", "a"], [], True),
        (["b</think>c", "a"], [], False),  # half of the finished ones
        (["a"], ["b</think>c", "b</think>c"], False),
        (["b</think>c", "d</think>e", "<think>a</think>f"], [], False),
        (["b</think>c"], ["<think>a"], False),
        ([], ["a"], False),
        ([], [], False),
    ],
)
def test_recorded_responses_whose_prompts_opened_the_thought(finished, unfinished, opened):
    assert opened_by_prompt([(text, True) for text in finished] + [(text, False) for text in unfinished]) == opened


@pytest.mark.parametrize(
    ("text", "unbegun"),
    [("a</think>b", True), ("<think>a</think>b", False), ("a</think><think>b", True), ("<think>a", False), ("", False)],
)
def test_the_end_of_a_thought_that_the_response_never_began(text, unbegun):
    assert ends_unbegun_thought(text) == unbegun
