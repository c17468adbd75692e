r"""Finding the final answer of a response: its last \boxed{}."""

import re
from dataclasses import dataclass

THINK_END = "</think>"
BOX_TOKEN = re.compile(
    r"\\(?:boxed|fbox|framebox)(?![A-Za-z])\s*(?:(?P<open>\{)|(?P<bare>[^\s{}$\\]+))?|\\.|[{}]", re.DOTALL
)
SEPARATOR = re.compile(r"\b(?:and|or)\b|[,;]")
NEAR, FAR = 10, 70  # characters between boxes of one answer; math-verify's own limits


@dataclass(frozen=True, slots=True)
class Box:
    r"""One closed \boxed{...}: where it stands in the text and what it holds."""

    start: int
    end: int
    content: str  # stripped, not empty


def find_boxes(text: str) -> list[Box]:
    r"""All outermost closed boxes with a content, in order; linear in the length of the text.

    Braces are matched, escaped ones ignored. An unclosed box is none, and neither is an empty one: responses quote the
    instruction to use `\boxed{}`. `\boxed 5` without braces counts.
    """
    boxes: list[Box] = []
    stack: list[tuple[int, int] | None] = []  # an open brace: (start, content start) of a box, None of anything else
    for token in BOX_TOKEN.finditer(text):
        if token["open"]:
            stack.append((token.start(), token.end()))
        elif token["bare"]:
            _append(boxes, Box(token.start(), token.end(), token["bare"].rstrip(".,;:!?")))
        elif token[0] == "{":
            stack.append(None)
        elif token[0] == "}" and stack:
            opened = stack.pop()
            if opened is not None:
                _append(boxes, Box(opened[0], token.end(), text[opened[1] : token.start()].strip()))
    return boxes


def _append(boxes: list[Box], box: Box) -> None:
    """Add a box, in place of the boxes that it encloses; `boxes` is sorted and disjoint before and after."""
    if not box.content:
        return
    while boxes and boxes[-1].start > box.start:
        boxes.pop()
    boxes.append(box)


def final_part(text: str) -> str:
    """What follows the last </think>, if a box stands there; else the whole text."""
    _, mark, tail = text.rpartition(THINK_END)
    return tail if mark and find_boxes(tail) else text


def last_box(text: str) -> str | None:
    r"""Content of the last \boxed{} of a response, nested boxes unwrapped; None without one."""
    boxes = find_boxes(final_part(text))
    return _unwrapped(boxes[-1].content) if boxes else None


def last_boxes(text: str) -> list[str]:
    r"""Contents of the last boxes that together make one answer, as in "\boxed{3} and \boxed{5}"; the last box is last.

    Boxes belong together when fewer than 10 characters stand between them, or fewer than 70 with "and", "or", "," or
    ";" among them: math-verify's rule.
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
    """The content without boxes around the whole of it."""
    while True:
        inner = find_boxes(content)
        if len(inner) != 1 or inner[0].start != 0 or inner[0].end != len(content):
            return content
        content = inner[0].content
