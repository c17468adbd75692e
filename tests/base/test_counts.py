"""Counts in messages have the right number."""

import pytest

from megatron_paint.base.counts import agreeing, count_text


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [
        (0, "problem", "0 problems"),
        (1, "problem", "1 problem"),
        (1234, "problem", "1,234 problems"),
        (1, "process", "1 process"),
        (2, "process", "2 processes"),
        (2, "prefix", "2 prefixes"),
        (2, "branch", "2 branches"),
        (1, "entry", "1 entry"),
        (3, "entry", "3 entries"),
        (3, "key", "3 keys"),
        (2, "held-out problem", "2 held-out problems"),
    ],
)
def test_a_count_and_its_noun(number, noun, text):
    assert count_text(number, noun) == text


def test_a_verb_agrees_with_the_number():
    assert [agreeing(number, "has", "have") for number in (0, 1, 2)] == ["have", "has", "have"]
