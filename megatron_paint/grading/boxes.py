r"""Finds \boxed{} in a text, and with it the final answer of a response.

`box_spans` is the only finder of boxes in the package: the grader and the overlap masker use it.
"""

import re
from typing import NamedTuple

from megatron_paint.grading.thoughts import THINK_END

BOXED = re.compile(r"\\boxed\s*\{")
ANY_BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s*\{")
BARE_BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?![A-Za-z])\s*(?P<content>[^\s{}$\\]+)")  # \boxed 5
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
SEPARATOR = re.compile(r"\b(?:and|or)\b|[,;]")
NEAR, FAR = 10, 70  # characters between two boxes of one answer; math-verify's limits


class Span(NamedTuple):
    """A range of a text: text[start:end] with its delimiters, text[content_start:content_end] without them."""

    start: int
    content_start: int
    content_end: int
    end: int


class Box(NamedTuple):
    r"""One closed \boxed{...}: its position in the text and its content."""

    start: int
    end: int
    content: str  # stripped, not empty


def box_spans(text: str, *, opener: re.Pattern[str] = BOXED, max_nesting: int | None = None) -> list[Span]:
    r"""Returns every `\boxed{...}` with matched braces, sorted by its start. The time is linear in the text's length.

    The result has nested boxes too. It has no unclosed ones. Escaped braces do not count.
    opener: matches the start of a box up to its opening brace. max_nesting: boxes inside this many other boxes are left
    out. An unclosed box counts as one that the text after it is inside.
    """
    openers = {match.end() - 1: match.start() for match in opener.finditer(text)}
    found = []
    scanned = 0
    for first in openers:
        if first < scanned:  # it is inside an earlier box, whose scan has found it
            continue
        open_braces = []
        nesting = 0
        for match in BRACE.finditer(text, first):
            brace = match.group()
            if brace == "{":
                open_braces.append(match.start())
                nesting += match.start() in openers
            elif brace == "}":
                opened = open_braces.pop()
                nesting -= opened in openers
                if opened in openers and (max_nesting is None or nesting < max_nesting):
                    found.append(Span(openers[opened], opened + 1, match.start(), match.end()))
                if not open_braces:
                    scanned = match.end()
                    break
        else:
            break
    return sorted(found)


def find_boxes(text: str) -> list[Box]:
    r"""Returns the outermost closed boxes that have a content, sorted by their start. The time is linear.

    `\fbox{}`, `\framebox{}` and a `\boxed 5` without braces count as boxes. An empty box does not count, because
    responses quote the instruction to use `\boxed{}`. `\\boxed{5}` is a line break and no box.
    """
    bare = [Span(match.start(), match.start("content"), match.end(), match.end()) for match in BARE_BOX.finditer(text)]
    boxes: list[Box] = []
    for span in sorted([*bare, *box_spans(text, opener=ANY_BOX)]):
        if _is_escaped(text, span.start) or (boxes and span.start < boxes[-1].end):
            continue
        content = text[span.content_start : span.content_end]
        content = content.strip() if span.content_end < span.end else content.rstrip(".,;:!?")
        if content:
            boxes.append(Box(span.start, span.end, content))
    return boxes


def _is_escaped(text: str, backslash: int) -> bool:
    r"""Tells whether a backslash belongs to the one before it, as the second one of `\\` does."""
    first = backslash
    while first > 0 and text[first - 1] == "\\":
        first -= 1
    return (backslash - first) % 2 == 1


def final_part(text: str) -> str:
    """Returns the text after the last </think> if a box is there, else the complete text."""
    _, mark, tail = text.rpartition(THINK_END)
    return tail if mark and find_boxes(tail) else text


def last_box(text: str) -> str | None:
    r"""Returns the content of the last \boxed{} of a response, without boxes around it; None if there is no box."""
    boxes = find_boxes(final_part(text))
    return _unwrapped(boxes[-1].content) if boxes else None


def last_boxes(text: str) -> list[str]:
    r"""Returns the contents of the last boxes that together make one answer, as in "\boxed{3} and \boxed{5}".

    They are in the order of the text. Boxes belong together when fewer than 10 characters are between them, or fewer
    than 70 characters that contain "and", "or", "," or ";". This is math-verify's rule.
    """
    part = final_part(text)
    boxes = find_boxes(part)
    if not boxes:
        return []
    first = len(boxes) - 1
    while first > 0:
        gap = part[boxes[first - 1].end : boxes[first].start]
        if len(gap) >= NEAR and not (len(gap) < FAR and SEPARATOR.search(gap)):
            break
        first -= 1
    return [_unwrapped(box.content) for box in boxes[first:]]


def _unwrapped(content: str) -> str:
    """Removes boxes that enclose the complete content. The time is linear."""
    spans = {span.start: span for span in box_spans(content, opener=ANY_BOX)}
    start, end = 0, len(content)
    while (span := spans.get(start)) is not None and span.end == end:
        inner = span.content_start, span.content_end
        while inner[0] < inner[1] and content[inner[0]].isspace():
            inner = inner[0] + 1, inner[1]
        while inner[0] < inner[1] and content[inner[1] - 1].isspace():
            inner = inner[0], inner[1] - 1
        if inner[0] == inner[1]:
            break
        start, end = inner
    content = content[start:end]
    bare = BARE_BOX.fullmatch(content)
    return (bare and bare["content"].rstrip(".,;:!?")) or content
