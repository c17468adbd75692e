r"""The final answer of a response for the graders that compare text: `exact`, `choice` and `regex`.

The answer is the last \boxed{}; without a box, what follows the last "Answer:". All rules here are ours.
"""

import re
from collections.abc import Sequence

from megatron_paint.grading.boxes import last_box
from megatron_paint.grading.normal_form import TEXT_NAMES, same_text
from megatron_paint.grading.thoughts import THINK_END

_MARKUP = "*_`$ \t"
_ANSWER_LINE = re.compile(
    r"^[ \t>*_#`-]{0,10}(?:the[ ]|my[ ])?(?:final[ ]|correct[ ])?answer(?:[ ]is)?[*_`]{0,3}"
    r"[ \t]{0,3}:[ \t]*(?P<answer>\S.*)$",
    re.IGNORECASE | re.MULTILINE,
)
# "the answer is (B)", "Answer: B". A capital A or I may be a word, so only a sign or the end of the line may follow.
_LETTER = re.compile(
    r"(?i:\banswer\b(?:[ ]is)?)[ \t*_`]{0,5}:?[ \t*_`$]{0,5}(?:\\text\w{0,2}\{)?"
    r"(?:\((?P<inside>[A-Za-z])\)|(?P<letter>[A-Z])(?=[).\],:;*_`}$]|[ \t]*$|[ ](?<![AI][ ])))",
    re.MULTILINE,
)
_TEXT_COMMAND = re.compile(rf"\\(?:{TEXT_NAMES})\s*\{{([^{{}}]*)\}}")
_ESCAPED = re.compile(r"\\([_#%&{}$])")
_LETTER_ALONE = re.compile(r"\(?([A-Za-z])[.):]?\)?")
_LETTER_FIRST = re.compile(r"\(([A-Za-z])\)[.:]?\s*\S.*|([A-Z])[.):]\s*\S.*", re.DOTALL)


def final_answer(text: str) -> str | None:
    """Returns the last box of a response, else the line after its last "Answer:"; None if there is neither."""
    box = last_box(text)
    if box is not None:
        return box
    lines = list(_ANSWER_LINE.finditer(text.rpartition(THINK_END)[2]))
    return (lines[-1]["answer"].strip(_MARKUP) or None) if lines else None


def texts_equal(given: str, gold: str, *, ignore_case: bool, white_space: str) -> bool:
    r"""Tells whether two answers are the same text, as the settings of the domain say.

    Of the given answer, a `\text{...}` around it, `$`, backticks and the backslash before `_ # % & { } $` may be left
    out: a word in a box needs them.
    """
    gold = _comparable(gold, ignore_case=ignore_case, white_space=white_space)
    bare = _without_command(given.strip().strip("$`"))
    candidates = (given, bare, _ESCAPED.sub(r"\1", bare))
    return any(_comparable(one, ignore_case=ignore_case, white_space=white_space) == gold for one in candidates)


def choice_in(text: str) -> str | None:
    """Returns the part of a response that names a choice: its last box, else the last "Answer: B"; None without one."""
    box = last_box(text)
    if box is not None:
        return box
    tail = text.rpartition(THINK_END)[2]
    letters = list(_LETTER.finditer(tail))
    lines = list(_ANSWER_LINE.finditer(tail))
    if lines and (not letters or letters[-1].start() < lines[-1].start()):
        return lines[-1]["answer"].strip(_MARKUP) or None
    return letters[-1]["inside"] or letters[-1]["letter"] if letters else None


def letter_of(text: str, choices: Sequence[str]) -> str | None:
    """Returns the capital letter of the choice that a text names: `B`, `(b)`, `B. 12`, or a choice's own text.

    choices: the texts of A, B, ...; empty: they are not known. A letter comes before a text. None: no choice is named,
    or its letter is behind the last choice.
    """
    plain = _without_command(text.strip().strip(_MARKUP)).strip(_MARKUP)
    if found := _LETTER_ALONE.fullmatch(plain):
        return _known(found[1], choices)
    for number, choice in enumerate(choices):
        if same_text(plain, choice) or _comparable(plain, ignore_case=True, white_space="collapse") == _comparable(
            choice, ignore_case=True, white_space="collapse"
        ):
            return chr(ord("A") + number)
    plain = _TEXT_COMMAND.sub(r"\1", plain)
    found = _LETTER_FIRST.fullmatch(plain)
    return _known(found[1] or found[2], choices) if found else None


def _known(letter: str, choices: Sequence[str]) -> str | None:
    letter = letter.upper()
    return letter if not choices or ord(letter) - ord("A") < len(choices) else None


def _without_command(text: str) -> str:
    found = _TEXT_COMMAND.fullmatch(text)
    return found[1].strip() if found else text


def _comparable(text: str, *, ignore_case: bool, white_space: str) -> str:
    text = text.strip()
    if white_space != "strip":
        text = (" " if white_space == "collapse" else "").join(text.split())
    return text.casefold() if ignore_case else text
