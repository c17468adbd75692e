"""Anchors of a worked solution: boxed answers, formulas and key numbers, and how they are found in a rollout.

The three kinds are PAINT's (arXiv 2604.26573); every rule of extraction and matching is ours. Everything here is plain
text in, plain values out, linear in the text length, and never raises, whatever the text.
"""

import re
import unicodedata
from collections.abc import Iterator
from typing import Literal, NamedTuple

from megatron_paint.masker.latex import Alignment, Span, alignments, blank, boxes, math_spans
from megatron_paint.masker.substring import Normal, standing_in

MIN_FORMULA_LENGTH = 3
TRIVIAL_NUMBERS = frozenset({"0", "1", "2"})
TRAILING_PUNCTUATION = ".,;:\u3002\uff0c\uff1b\uff1a"  # Latin and Chinese


class Mark(NamedTuple):
    """An anchor before it is looked for."""

    kind: Literal["boxed", "formula", "number"]
    text: str  # normalised
    is_number: bool  # matched by the number rule: every number, and a box that holds only a number


# Removed with white space. Patterns here start with a literal or a class, which lets the engine skip to candidates.
_SPACING = re.compile(r"\\(?:(?:left|right|displaystyle|quad|qquad)(?![A-Za-z])|[,!;: ()\[\]])")
_DOLLAR = re.compile(r"\$(?<!\\\$)")  # `\$` is a currency sign and stays
_OPERATOR = re.compile(
    "[-+*/^_=<>\u00b1\u00b7\u00d7\u00f7\u2190-\u21ff\u2200-\u22ff]"  # the last two: arrows, mathematical operators
    r"|\\(?:[dt]?frac|sqrt|d?binom|leq?|leqslant|geq?|geqslant|neq?|lt|gt|times|cdot|div|pm|mp|ast|circ|bmod|pmod|mod"
    r"|equiv|approx|sim|simeq|cong|propto|mid|nmid|in|notin|subset|subseteq|supset|supseteq|cup|cap|setminus|to"
    r"|rightarrow|leftarrow|Rightarrow|Leftarrow|Leftrightarrow|mapsto|implies|iff|perp|parallel|sum|prod|int"
    r")(?![A-Za-z])"
)
_MAYBE_THOUSANDS = re.compile(r",\}?(?:\\!)?[0-9][0-9][0-9]")
_THOUSANDS = re.compile(r"(?<![0-9.])[0-9]{1,3}(?:(?:,(?:\\!)?|\{,\}|\\,)[0-9]{3})+(?![0-9])")
_SEPARATOR = re.compile(r"[^0-9]+")
_FRACTION_OF_DIGITS = re.compile(r"(frac[0-9])([0-9])")  # \frac34 holds 3 and 4, not 34
# 12, 1.5, 18% and 3/4, whose 4 is left for the next match; `.5` too where no digit or dot stands before it
_NUMBER = re.compile(
    r"([0-9.](?:(?<=[0-9])[0-9]*(?:\.[0-9]+)?|(?<=\.)(?<![0-9.]\.)[0-9]+))"
    r"(?:/(?=([0-9]+)(?![0-9]|\.[0-9]))|(\\?%))?"
)
_ONLY_NUMBER_CHARACTERS = bytes(code if chr(code) in "0123456789./%\\" else ord(" ") for code in range(256))
_ONLY_NUMBER = re.compile(r"(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)(?:\\?%)?|[0-9]+/[0-9]+")
_ROW_END = "\x00"
_NOT_ASCII = re.compile("[^\x00-\x7f]+")


def extract_math(problem: str, solution: str) -> tuple[Mark, ...]:
    """The anchors of a solution: boxes, then formulas, then numbers, each kind in order of appearance.

    Deduplicated by normalised text over all kinds; a box wins over a formula, a formula over a number.
    """
    found_boxes = boxes(solution)
    found_alignments = alignments(solution)
    flat = _flatten(solution, found_boxes, found_alignments)
    marks: dict[str, Mark] = {}
    for box in found_boxes:
        mark = _boxed_mark(flat[box.content_start : box.content_end])
        if mark.text:
            marks.setdefault(mark.text, mark)
    formulas = _formulas(solution, flat, found_boxes, found_alignments)
    given_formulas = standing_in(normalise(flatten(problem)), list(formulas))
    for formula in formulas:
        if formula not in marks and formula not in given_formulas:
            marks[formula] = Mark("formula", formula, False)
    given_numbers = numbers_in(problem)
    for number in _number_texts(blank(solution, [(box.start, box.end) for box in found_boxes])):
        if number not in marks and number not in TRIVIAL_NUMBERS and number not in given_numbers:
            marks[number] = Mark("number", number, True)
    return tuple(marks.values())


def find_math(marks: tuple[Mark, ...], rollout: str) -> tuple[bool, ...]:
    """For each anchor, whether the rollout holds it."""
    numbers = numbers_in(rollout)
    passages = standing_in(normalise(flatten(rollout)), [mark.text for mark in marks if not mark.is_number])
    return tuple(mark.text in (numbers if mark.is_number else passages) for mark in marks)


def flatten(text: str) -> str:
    """The text, of the same length, with `\\boxed{}` unwrapped and the marks and `&` of alignments blanked."""
    return _flatten(text, boxes(text), alignments(text))


def normalise(flat: str) -> Normal:
    """Flattened text without white space, delimiters and spacing; `\\dfrac` and `\\tfrac` become `\\frac`."""
    return Normal(_pieces(flat))


def numbers_in(text: str) -> set[str]:
    """Every number that stands in the text on digit boundaries: a/b and 18% count as such and as 18, a and b."""
    found: set[str] = set()
    for number, denominator, percent in _NUMBER.findall(_number_words(text)):
        found.add(number)
        if percent:
            found.add(number + "%")
        elif denominator and "." not in number:
            found.add(f"{number}/{denominator}")
    return found


def _flatten(text: str, found_boxes: list[Span], found_alignments: list[Alignment]) -> str:
    ranges = []
    for box in found_boxes:
        ranges += [(box.start, box.content_start), (box.content_end, box.end)]
    for alignment in found_alignments:
        ranges += alignment.marks
        ranges += [(at, at + 1) for at in alignment.ampersands]
    return blank(text, ranges)


def _pieces(flat: str) -> list[str]:
    text = flat
    if "\\" in text:
        # A line break after each row end keeps its second backslash from being read as the start of a command.
        text = text.replace("\\\\", "\\\\\n").replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
        text = _SPACING.sub(" ", text)
    if "$" in text:
        text = _DOLLAR.sub(" ", text) if "\\$" in text else text.replace("$", " ")
    return text.split()


def _squeeze(flat: str) -> str:
    return "".join(_pieces(flat)).rstrip(TRAILING_PUNCTUATION)


def _boxed_mark(content: str) -> Mark:
    number = " ".join(_pieces(_tidy_numbers(content))).rstrip(TRAILING_PUNCTUATION)
    if _ONLY_NUMBER.fullmatch(number):
        return Mark("boxed", number.replace("\\%", "%"), True)
    return Mark("boxed", _squeeze(content), False)


def _formulas(solution: str, flat: str, found_boxes: list[Span], found_alignments: list[Alignment]) -> dict[str, None]:
    """Normalised formulas in order of appearance: the rows of math spans, but for those that are only a box."""
    rows: list[str] = []
    next_box = 0
    for start, end in _rows(math_spans(solution, found_alignments), found_alignments):
        while next_box < len(found_boxes) and found_boxes[next_box].start < start:
            next_box += 1
        inner_boxes = []
        while next_box < len(found_boxes) and found_boxes[next_box].start < end:
            inner_boxes.append((found_boxes[next_box].start - start, found_boxes[next_box].end - start))
            next_box += 1
        row = flat[start:end]
        if _OPERATOR.search(row) and not (inner_boxes and not _squeeze(blank(row, inner_boxes))):
            rows.append(row.replace(_ROW_END, " "))
    # All rows are normalised at once, which takes a third of the time.
    formulas = "".join(_pieces(_ROW_END.join(rows))).split(_ROW_END)
    stripped = (formula.rstrip(TRAILING_PUNCTUATION) for formula in formulas)
    return dict.fromkeys(formula for formula in stripped if len(formula) >= MIN_FORMULA_LENGTH)


def _rows(spans: list[Span], found_alignments: list[Alignment]) -> Iterator[tuple[int, int]]:
    """The spans, in order, cut at the rows and marks of the alignments inside them."""
    cuts = sorted(cut for alignment in found_alignments for cut in (*alignment.marks, *alignment.rows))
    next_cut = 0
    for span in spans:
        start = span.content_start
        while next_cut < len(cuts) and cuts[next_cut][0] < start:
            next_cut += 1
        while next_cut < len(cuts) and cuts[next_cut][1] <= span.content_end:
            yield start, cuts[next_cut][0]
            start = cuts[next_cut][1]
            next_cut += 1
        yield start, span.content_end


def _number_texts(text: str) -> list[str]:
    """The numbers of a text as anchors: a/b is one number, and so is 18%."""
    texts = []
    is_denominator = False
    for number, denominator, percent in _NUMBER.findall(_number_words(text)):
        if is_denominator:
            is_denominator = False
        elif percent:
            texts.append(number + "%")
        elif denominator and "." not in number:
            texts.append(f"{number}/{denominator}")
            is_denominator = True
        else:
            texts.append(number)
    return texts


def _number_words(text: str) -> str:
    """The words of tidy text that numbers are made of, each once and in order: a tenth of the text to look through."""
    ascii_text = _tidy_numbers(text).encode("ascii", "replace")
    return " ".join(dict.fromkeys(ascii_text.translate(_ONLY_NUMBER_CHARACTERS).decode().split()))


def _tidy_numbers(text: str) -> str:
    """The text with thousands separators removed, every script's digits as 0-9 and `\\frac34` read as 3 and 4."""
    if not text.isascii():
        for digit in {c for c in "".join(_NOT_ASCII.findall(text)) if c.isdecimal()}:
            text = text.replace(digit, str(unicodedata.decimal(digit)))
    if _MAYBE_THOUSANDS.search(text):
        text = _THOUSANDS.sub(lambda match: _SEPARATOR.sub("", match.group()), text)
    return _FRACTION_OF_DIGITS.sub(r"\1 \2 ", text) if "frac" in text else text
