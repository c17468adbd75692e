"""Thoughts: where a prompt ends, how a solution continues it, and that no turn ends inside a thought."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_paint.data.thoughts import continuation, state_after


@pytest.mark.parametrize(
    ("text", "state"),
    [
        ("<|im_start|>assistant\n", "none"),
        ("", "none"),
        ("<think>\n", "open"),
        ("<think>", "open"),
        ("<think>\n\n</think>\n\n", "closed"),
        ("</think>", "closed"),
        ("<think>a</think>b<think>c", "open"),
    ],
)
def test_state(text, state):
    assert state_after(text) == state


NONE, OPEN, BARE, CLOSED = "assistant\n", "assistant\n<think>\n", "assistant<think>", "<think>\n\n</think>\n\n"
THOUGHT = "<think>\nTwo.\n</think>\n\nIt is 2."


@pytest.mark.parametrize(
    ("end", "solution", "expected"),
    [
        (NONE, "It is 2.", ("", "It is 2.")),
        (NONE, THOUGHT, ("", THOUGHT)),
        (CLOSED, "It is 2.", ("", "It is 2.")),
        (CLOSED, THOUGHT, ("", THOUGHT)),
        # The prompt has the tag already.
        (OPEN, THOUGHT, ("", "Two.\n</think>\n\nIt is 2.")),
        (OPEN, "\n " + THOUGHT, ("", "Two.\n</think>\n\nIt is 2.")),
        (BARE, THOUGHT, ("", "\nTwo.\n</think>\n\nIt is 2.")),
        # A trace that was recorded behind such a prompt.
        (OPEN, "Two.\n</think>\n\nIt is 2.", ("", "Two.\n</think>\n\nIt is 2.")),
        # An answer alone: prompt and response hold the empty thought.
        (OPEN, "It is 2.", ("\n</think>\n\n", "It is 2.")),
        (BARE, "It is 2.", ("\n\n</think>\n\n", "It is 2.")),
        (OPEN + "\n", "It is 2.", ("</think>\n\n", "It is 2.")),
        (OPEN + "Well, ", "It is 2.", ("\n</think>\n\n", "It is 2.")),
        # A turn that would end inside a thought.
        (NONE, "<think>\nTwo.", None),
        (OPEN, "<think>\nTwo.", None),
        (CLOSED, "It is 2. <think>Or", None),
        (OPEN, "a</think>b<think>c", None),
    ],
)
def test_continuation(end, solution, expected):
    assert continuation(end, solution) == expected


@given(
    st.sampled_from([NONE, OPEN, BARE, CLOSED]),
    st.lists(st.sampled_from(["<think>", "</think>", "\n", "a", " "]), max_size=8).map("".join),
)
def test_no_turn_ends_inside_a_thought(end, solution):
    continued = continuation(end, solution)
    if continued is None:
        assert state_after(solution) == "open"
    else:
        closing, text = continued
        assert state_after(end + closing + text) != "open"
        assert solution.endswith(text)
