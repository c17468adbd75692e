"""The thought of a response: where it ends, and whether a box in a thought that never ends is an answer.

A model thinks between <think> and </think>, then it answers. A response that is cut at the length limit may end inside
the thought.
"""

from collections.abc import Sequence
from typing import Literal

THINK_START, THINK_END = "<think>", "</think>"
PROMPT_TAIL = 8  # tokens at a prompt's end; enough for <think> and the white space after it

BoxInThought = Literal["ignore", "count"]


def unfinished_thought(text: str) -> int | None:
    """Returns the index where a thought begins that never ends; None if every thought of the text ends."""
    start = text.find(THINK_START, text.rfind(THINK_END) + 1)
    return None if start < 0 else start


def answer_text(text: str, box_in_thought: BoxInThought) -> str:
    """Returns the text whose boxes may be the answer: under `ignore` without a thought that never ends."""
    start = unfinished_thought(text) if box_in_thought == "ignore" else None
    return text if start is None else text[:start]


def continued(prompt_end: str, response: str) -> str:
    """Returns the response with the <think> that the prompt ends with, as templates of thinking-only models do."""
    return THINK_START + response if prompt_end.rstrip().endswith(THINK_START) else response


def ends_unbegun_thought(response: str) -> bool:
    """Tells whether a response ends a thought that it never began."""
    before, end, _ = response.partition(THINK_END)
    return bool(end) and THINK_START not in before


def opened_by_prompt(responses: Sequence[tuple[str, bool]]) -> bool:
    """Tells whether the prompts of recorded responses, (text, whether it is finished), probably opened a thought.

    They did if no response contains <think> and more than half of the finished ones contain </think>. So a few stray
    tags in a file do not decide about its other responses.
    """
    if any(THINK_START in text for text, _ in responses):
        return False
    ended = [THINK_END in text for text, finished in responses if finished]
    return 2 * sum(ended) > len(ended)
