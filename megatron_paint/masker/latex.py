"""Finds boxes, math spans and alignment rows in a LaTeX text. The time is linear, and any text is safe."""

import re
from typing import NamedTuple

from megatron_paint.grading.boxes import Span, box_spans

_ALIGNMENTS = frozenset(name + star for name in ("align", "aligned", "equation", "gather") for star in ("", "*"))

MAX_BOX_NESTING = 8  # far above real texts; without it, the anchors of nested boxes would repeat their content
_ALIGNMENT_BEGINS = re.compile(r"\\begin\{(?:align(?:ed)?|equation|gather)\*?\}")
_ENVIRONMENT_TOKEN = re.compile(
    # The length of a row's [space] is bounded. Without the bound, many `\\[` would each be read to the end of the text.
    r"\\begin\{(?P<begin>\w+\*?)\}|\\end\{(?P<end>\w+\*?)\}|(?P<row>\\\\\*?(?:\[[^\]\n]{0,20}\])?)|\\.|[&{}]",
    re.DOTALL,
)
_SPAN_TOKEN = re.compile(
    r"\\\\|\\[$()\[\]]|\$\$?|\\begin\{(?:align(?:ed)?|equation|gather)\*?\}|\n[ \t\r]*(?=\n)",
)
_CLOSERS = {"$": "$", "$$": "$$", "\\(": "\\)", "\\[": "\\]"}


class Alignment(NamedTuple):
    """One closed alignment: align, aligned, equation or gather, with or without a star."""

    span: Span
    rows: tuple[tuple[int, int], ...]  # ranges of its own `\\`
    ampersands: tuple[int, ...]  # positions of its own `&`

    @property
    def delimiters(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Ranges of its `\\begin{}` and `\\end{}`."""
        return (self.span.start, self.span.content_start), (self.span.content_end, self.span.end)


def boxes(text: str) -> list[Span]:
    """Returns every closed `\\boxed{...}` inside fewer than MAX_BOX_NESTING other boxes, sorted by its start."""
    return box_spans(text, max_nesting=MAX_BOX_NESTING) if "\\boxed" in text else []


class _Frame:
    """An environment whose end was not found yet."""

    __slots__ = ("ampersands", "begin", "depth", "name", "rows")

    def __init__(self, name: str, begin: re.Match, depth: int):
        self.name, self.begin, self.depth = name, begin, depth
        self.rows: list[tuple[int, int]] = []
        self.ampersands: list[int] = []


def alignments(text: str) -> list[Alignment]:
    """Returns every closed alignment, sorted by its start. The `\\\\` and `&` of a matrix inside it do not count."""
    first = _ALIGNMENT_BEGINS.search(text)
    if first is None:
        return []
    found = []
    frames: list[_Frame] = []
    open_names: dict[str, int] = {}
    depth = 0
    for match in _ENVIRONMENT_TOKEN.finditer(text, first.start()):
        token = match.group()
        if token == "{":
            depth += 1
        elif token == "}":
            depth -= depth > 0
        elif name := match["begin"]:
            frames.append(_Frame(name, match, depth))
            open_names[name] = open_names.get(name, 0) + 1
        elif (name := match["end"]) and open_names.get(name):
            while True:  # drops the environments that were left open inside
                frame = frames.pop()
                open_names[frame.name] -= 1
                if frame.name == name:
                    break
            depth = frame.depth
            if name in _ALIGNMENTS:
                span = Span(*frame.begin.span(), *match.span())
                found.append(Alignment(span, tuple(frame.rows), tuple(frame.ampersands)))
        elif frames and frames[-1].depth == depth and frames[-1].name in _ALIGNMENTS:
            if token == "&":
                frames[-1].ampersands.append(match.start())
            elif match["row"]:
                frames[-1].rows.append(match.span())
    return sorted(found)


def math_spans(text: str, found_alignments: list[Alignment]) -> list[Span]:
    """Returns the outermost math spans in order: `$..$`, `$$..$$`, `\\(..\\)`, `\\[..\\]` and alignments.

    An opening delimiter without a closing one is plain text. So is a `$` if its paragraph ends before the closing `$`,
    as in TeX. Otherwise a price in one paragraph would make the next paragraph a formula.
    """
    tokens = [(match.start(), match.group()) for match in _SPAN_TOKEN.finditer(text)]
    alignment_at = {alignment.span.start: alignment.span for alignment in found_alignments}
    spans: list[Span] = []
    never_closed: set[str] = set()
    index = 0
    while index < len(tokens):
        start, token = tokens[index]
        if start in alignment_at:
            spans.append(alignment_at[start])
            while index < len(tokens) and tokens[index][0] < spans[-1].end:
                index += 1
            continue
        closing = _closing(tokens, index) if token in _CLOSERS and token not in never_closed else 0
        if closing is None:
            never_closed.add(token)
        if not closing:
            index += 1
            continue
        at, closer = tokens[closing]
        spans.append(Span(start, start + len(token), at, at + len(token)))
        if closer != _CLOSERS[token]:  # $x$$y$: the second half of `$$` opens the next span
            tokens[closing] = (at + 1, "$")
            index = closing
        else:
            index = closing + 1
    return spans


def _closing(tokens: list[tuple[int, str]], opener: int) -> int | None:
    """Returns the index of the closing token; 0 if the paragraph ends before it; None if the text has none."""
    token = tokens[opener][1]
    closer = _CLOSERS[token]
    if opener + 1 < len(tokens) and tokens[opener + 1][1] == closer:
        return opener + 1
    inline = token == "$"
    for index in range(opener + 1, len(tokens)):
        candidate = tokens[index][1]
        if candidate == closer or (inline and candidate == "$$"):
            return index
        if inline and candidate[0] == "\n":
            return 0
    return None


def blank(text: str, ranges: list[tuple[int, int]], sign: str = " ") -> str:
    """Returns the text, of the same length, with this sign in place of all in the ranges. Ranges may overlap."""
    if not ranges:
        return text
    pieces = []
    at = 0
    for start, end in sorted(ranges):
        if end > at:
            start = max(start, at)
            pieces += [text[at:start], sign * (end - start)]
            at = end
    pieces.append(text[at:])
    return "".join(pieces)
