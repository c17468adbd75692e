"""Thoughts in prompts and responses: what lies between <think> and </think>.

A prompt may end inside a thought that the chat template has opened (thinking-only models), after a closed one
(non-thinking mode), or without one. A response continues from there, and it must not end inside a thought.
"""

from typing import Literal

from megatron_paint.grading.thoughts import THINK_END, THINK_START

EMPTY = f"{THINK_START}\n\n{THINK_END}\n\n"  # Qwen3's empty thought

ThoughtState = Literal["none", "open", "closed"]


def state_after(text: str) -> ThoughtState:
    """The state at the end of a text: inside a thought, after a closed one, or there was none."""
    opened, closed = text.rfind(THINK_START), text.rfind(THINK_END)
    if opened == closed:  # both are -1
        return "none"
    return "open" if opened > closed else "closed"


def has_tags(text: str) -> bool:
    """Tells whether a text contains one of the two tags."""
    return THINK_START in text or THINK_END in text


def continuation(prompt_end: str, solution: str) -> tuple[str, str] | None:
    """Returns a solution as the continuation of a prompt: what closes the prompt's thought, and the text after it.

    prompt_end: what the chat template writes after the user's message. If it opens a thought, it has the <think> with
    which the solution begins, so that <think> is left out. A solution without any tag is an answer and no thought: the
    open thought is closed first, and prompt and response then hold Qwen3's empty thought. Returns None if the turn
    would end inside a thought.
    """
    if state_after(solution) == "open":
        return None
    if state_after(prompt_end) != "open":
        return "", solution
    after_tag = prompt_end.rpartition(THINK_START)[2]
    if solution.lstrip().startswith(THINK_START):
        return "", solution.lstrip().removeprefix(THINK_START).removeprefix(after_tag)
    if has_tags(solution):
        return "", solution
    opened = THINK_START + after_tag
    return (EMPTY.removeprefix(opened) if EMPTY.startswith(opened) else f"\n{THINK_END}\n\n"), solution
