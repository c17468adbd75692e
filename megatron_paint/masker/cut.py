"""Cuts a solution after a share of it, at a boundary that a reader would choose.

The rules of cutting are ours. The cut is a pure function of the text and its token offsets.
"""

import math
import re
import unicodedata
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from megatron_paint.masker.latex import Span, alignments, boxes, math_spans

BOUNDARY_WINDOW = 0.15  # share of the prefix; a sentence or line end this near to the prefix's end becomes the cut
SPAN_SHARE = 0.5  # share of the prefix; if less would be left before a math span, the cut is inside the span
_CLOSING = r"[\"'\u201d\u2019)\]}$*]*"  # quotes, brackets and delimiters that belong to the sentence they close
_BOUNDARY = re.compile(rf"\n|[.!?]{_CLOSING}(?=\s|$)|[\u3002\uff01\uff1f]{_CLOSING}")
_ROW_BOUNDARY = re.compile(r"\\\\|\\.|\n", re.DOTALL)

_LINE_END = re.compile(r"\n")

Offsets = Sequence[tuple[int, int]]  # start and end of each token of a solution, in characters


class Parts(NamedTuple):
    """The parts of a solution that a cut keeps complete where it can, in order and without overlaps.

    formulas: math spans and boxes, which may be cut at their rows. others: statements of code and anchors of a text,
    which may be cut at their line ends.
    """

    formulas: list[Span]
    others: Sequence[Span] = ()


def math_parts(solution: str) -> Parts:
    """Returns the math spans and boxes."""
    return Parts(merged([*math_spans(solution, alignments(solution)), *boxes(solution)]))


def cut_solution(
    solution: str,
    *,
    share: float,
    offsets: Offsets,
    unit: str = "token",
    hide_answer: bool = False,
    parts: Callable[[str], Parts] = math_parts,
) -> str:
    """Returns the prefix of a solution for a share in [0, 1]. At share 1 it is the solution, byte for byte.

    First the prefix has ceil(share x count - 1e-9) tokens or segments. Segments are sentences and lines. They never end
    inside a math span or another part. Then the end moves backwards, never forwards: to the last sentence or line end
    in the last 15 % of the prefix, else out of a part. It is never inside a character. White space at the end of a cut
    prefix is removed.

    offsets: start and end of each token, in characters. unit: token or segment. hide_answer: the prefix ends before
    the last box, for every share. parts: finds the parts that are kept complete where possible; those of the domain.
    """
    found_boxes = boxes(solution)
    found = parts(solution)
    others = {span.start for span in found.others}
    spans = merged([*found.formulas, *found.others])
    if unit == "segment":
        ends = list(_segment_ends(solution, spans))
        kept = _kept(share, len(ends))
        limit = ends[kept - 1] if kept else 0
    else:
        limit = _token_limit(solution, offsets, _kept(share, len(offsets)))
    at_boundary = unit == "segment" or limit == len(solution)
    if hide_answer and found_boxes:
        last_box = max(found_boxes, key=lambda box: box.end)
        if last_box.start < limit:
            limit, at_boundary = last_box.start, False
    if limit == len(solution):
        return solution
    return solution[: limit if at_boundary else _back_off(solution, limit, spans, others)].rstrip()


def _kept(share: float, count: int) -> int:
    return min(count, math.ceil(share * count - 1e-9))


def _token_limit(solution: str, offsets: Offsets, kept: int) -> int:
    """Returns the end of the first `kept` tokens, in characters. A character that later tokens share is left out."""
    if kept >= len(offsets):
        return len(solution)
    limit = min(offsets[kept - 1][1], offsets[kept][0]) if kept else 0
    while 0 < limit < len(solution) and _is_inside_character(solution, limit):
        limit -= 1
    return limit


def _is_inside_character(text: str, at: int) -> bool:
    """Tells whether a cut would separate an accent, a joined emoji or a variation mark from its base character."""
    return (
        unicodedata.category(text[at])[0] == "M"
        or text[at] in "\u200d\U0001f3fb\U0001f3fc\U0001f3fd\U0001f3fe\U0001f3ff"
        or text[at - 1] == "\u200d"
    )


def _back_off(solution: str, limit: int, spans: list[Span], others: set[int]) -> int:
    """others: starts of the spans that are no formulas."""
    boundaries = _boundaries(solution, limit, spans, at_least=limit * (1 - BOUNDARY_WINDOW))
    boundary = max(boundaries, default=None)
    if boundary is not None:
        return boundary
    span = _span_around(spans, limit)
    if span is None:
        return limit
    if span.start < SPAN_SHARE * limit:
        return _cut_inside(solution, limit, span, rows=_LINE_END if span.start in others else _ROW_BOUNDARY)
    return span.start


def _boundaries(solution: str, limit: int, spans: list[Span], at_least: float) -> Iterator[int]:
    """Yields sentence and line ends outside math, from `at_least` up to the limit."""
    for match in _BOUNDARY.finditer(solution, max(0, math.ceil(at_least) - 8)):
        end = match.start() if match.group() == "\n" else match.end()
        if match.start() >= limit and end > limit:
            break
        if at_least <= end <= limit and _span_around(spans, end) is None:
            yield end


def _cut_inside(solution: str, limit: int, span: Span, *, rows: re.Pattern[str]) -> int:
    """Returns the last row or line end inside a span, else its start. It is never inside a box of the span."""
    inner = [box for box in boxes(solution[: span.end]) if box.start >= span.start]
    cut = span.start
    for match in rows.finditer(solution, span.content_start, limit):
        is_end = match.group() in ("\\\\", "\n")
        if is_end and not any(box.start < match.start() < box.end for box in inner):
            cut = match.start()
    return cut if solution[span.content_start : cut].strip() else span.start


def _segment_ends(solution: str, spans: list[Span]) -> Iterator[int]:
    """Yields the ends of sentences and lines. The last one is the end of the solution."""
    last = 0
    for end in _boundaries(solution, len(solution), spans, at_least=0):
        if solution[last:end].strip() and solution[end:].strip():
            yield end
            last = end
    yield len(solution)


def _span_around(spans: list[Span], at: int) -> Span | None:
    """Returns the span that has a position strictly inside; None if there is none."""
    index = bisect_right(spans, at, key=lambda span: span.start) - 1
    return spans[index] if index >= 0 and spans[index].start < at < spans[index].end else None


def merged(spans: list[Span]) -> list[Span]:
    """Returns the spans in order. Overlapping spans become one."""
    found: list[Span] = []
    for span in sorted(spans):
        if found and span.start < found[-1].end:
            if span.end > found[-1].end:
                found[-1] = Span(found[-1].start, found[-1].content_start, span.content_end, span.end)
        else:
            found.append(span)
    return found
