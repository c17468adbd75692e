"""Anchors of a worked solution: boxed answers, formulas and key numbers, and how they are found in a rollout.

The three kinds are PAINT's (arXiv 2604.26573). Every rule of extraction and matching is ours. The functions take plain
text and return plain values. Their time is linear in the text length. They never raise, on any text.
"""

import re
import unicodedata
from collections.abc import Iterator
from typing import NamedTuple

from megatron_paint.masker.latex import Alignment, Span, alignments, blank, boxes, math_spans
from megatron_paint.masker.substring import NormalisedText, find_substrings

MIN_FORMULA_LENGTH = 3
TRIVIAL_NUMBERS = frozenset({"0", "1", "2"})
TRAILING_PUNCTUATION = ".,;:\u3002\uff0c\uff1b\uff1a"  # Latin and Chinese


class ExtractedAnchor(NamedTuple):
    """An anchor of a solution, before a rollout is searched for it."""

    kind: str  # boxed, formula or number; other domains have others
    text: str  # normalised
    is_number: bool  # matched by the number rule: true for every number and for a box that holds only a number


# Removed with white space. Patterns here start with a literal or a class, so the engine can skip to candidates.
_SPACING = re.compile(r"\\(?:(?:left|right|displaystyle|quad|qquad)(?![A-Za-z])|[,!;: ()\[\]])")
_DOLLAR = re.compile(r"\$(?<!\\\$)")  # `\$` is a currency sign and is kept
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
# 12, 1.5, 18% and 3/4, whose 4 is left for the next match. Also `.5` if no digit or dot is before it.
_NUMBER = re.compile(
    r"([0-9.](?:(?<=[0-9])[0-9]*(?:\.[0-9]+)?|(?<=\.)(?<![0-9.]\.)[0-9]+))"
    r"(?:/(?=([0-9]+)(?![0-9]|\.[0-9]))|(\\?%))?"
)
_ONLY_NUMBER_CHARACTERS = bytes(code if chr(code) in "0123456789./%\\" else ord(" ") for code in range(256))
_ONLY_NUMBER = re.compile(r"(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)(?:\\?%)?|[0-9]+/[0-9]+")
_ROW_END = "\x00"
_NOT_ASCII = re.compile("[^\x00-\x7f]+")


def extract_math(problem: str, solution: str) -> tuple[ExtractedAnchor, ...]:
    """Returns the anchors of a solution: boxes, then formulas, then numbers, each kind in order of appearance.

    Anchors with the same normalised text appear once. A box wins over a formula, and a formula over a number.
    """
    found_boxes = boxes(solution)
    found_alignments = alignments(solution)
    flat = _flatten(solution, found_boxes, found_alignments)
    extracted: dict[str, ExtractedAnchor] = {}
    for box in found_boxes:
        anchor = _boxed_anchor(flat[box.content_start : box.content_end])
        if anchor.text:
            extracted.setdefault(anchor.text, anchor)
    formulas = _formulas(solution, flat, found_boxes, found_alignments)
    given_formulas = find_substrings(normalise(flatten(problem)), list(formulas))
    for formula in formulas:
        if formula not in extracted and formula not in given_formulas:
            extracted[formula] = ExtractedAnchor("formula", formula, False)
    given_numbers = numbers_in(problem)
    for number in _number_texts(blank(solution, [(box.start, box.end) for box in found_boxes])):
        if number not in extracted and number not in TRIVIAL_NUMBERS and number not in given_numbers:
            extracted[number] = ExtractedAnchor("number", number, True)
    return tuple(extracted.values())


def extract_boxes(solution: str) -> tuple[ExtractedAnchor, ...]:
    """Returns the boxes of a solution in order of appearance, as `extract_math` does. `find_math` finds them."""
    found_boxes = boxes(solution)
    flat = _flatten(solution, found_boxes, []) if found_boxes else ""
    found = [_boxed_anchor(flat[box.content_start : box.content_end]) for box in found_boxes]
    return tuple({anchor.text: anchor for anchor in reversed(found) if anchor.text}.values())[::-1]


def find_math(anchors: tuple[ExtractedAnchor, ...], rollout: str) -> tuple[bool, ...]:
    """Tells for each anchor whether the rollout contains it."""
    numbers = numbers_in(rollout)
    passages = find_substrings(normalise(flatten(rollout)), [anchor.text for anchor in anchors if not anchor.is_number])
    return tuple(anchor.text in (numbers if anchor.is_number else passages) for anchor in anchors)


def flatten(text: str) -> str:
    """Returns the text, of the same length, with spaces in place of `\\boxed{` and its `}`, and of alignment markup."""
    return _flatten(text, boxes(text), alignments(text))


def normalise(flat: str) -> NormalisedText:
    """Removes white space, math delimiters and spacing from flattened text. `\\dfrac` and `\\tfrac` become `\\frac`."""
    return NormalisedText(_pieces(flat))


def numbers_in(text: str) -> set[str]:
    """Returns every number of the text on digit boundaries. a/b also counts as a and b, and 18% also counts as 18."""
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
        ranges += alignment.delimiters
        ranges += [(at, at + 1) for at in alignment.ampersands]
    return blank(text, ranges)


def _pieces(flat: str) -> list[str]:
    text = flat
    if "\\" in text:
        # The added line break keeps the second backslash of a row end from being read as the start of a command.
        text = text.replace("\\\\", "\\\\\n").replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
        text = _SPACING.sub(" ", text)
    if "$" in text:
        text = _DOLLAR.sub(" ", text) if "\\$" in text else text.replace("$", " ")
    return text.split()


def _squeeze(flat: str) -> str:
    return "".join(_pieces(flat)).rstrip(TRAILING_PUNCTUATION)


def _boxed_anchor(content: str) -> ExtractedAnchor:
    number = " ".join(_pieces(_tidy_numbers(content))).rstrip(TRAILING_PUNCTUATION)
    if _ONLY_NUMBER.fullmatch(number):
        return ExtractedAnchor("boxed", number.replace("\\%", "%"), True)
    return ExtractedAnchor("boxed", _squeeze(content), False)


def _formulas(solution: str, flat: str, found_boxes: list[Span], found_alignments: list[Alignment]) -> dict[str, None]:
    """Returns the normalised formulas in order: the rows of math spans, except rows that are only a box."""
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
    # Normalising all rows at once takes a third of the time.
    formulas = "".join(_pieces(_ROW_END.join(rows))).split(_ROW_END)
    stripped = (formula.rstrip(TRAILING_PUNCTUATION) for formula in formulas)
    return dict.fromkeys(formula for formula in stripped if len(formula) >= MIN_FORMULA_LENGTH)


def _rows(spans: list[Span], found_alignments: list[Alignment]) -> Iterator[tuple[int, int]]:
    """Yields the spans in order, cut at the rows, begins and ends of the alignments inside them."""
    cuts = sorted(cut for alignment in found_alignments for cut in (*alignment.delimiters, *alignment.rows))
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
    """Returns the numbers of a text as anchors. a/b is one number, and so is 18%."""
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
    """Returns the words of the text that can hold numbers, each once and in order. They are a tenth of the text."""
    ascii_text = _tidy_numbers(text).encode("ascii", "replace")
    return " ".join(dict.fromkeys(ascii_text.translate(_ONLY_NUMBER_CHARACTERS).decode().split()))


def _tidy_numbers(text: str) -> str:
    """Removes thousands separators, writes the digits of every script as 0-9 and separates the digits of `\\frac34`."""
    if not text.isascii():
        for digit in {c for c in "".join(_NOT_ASCII.findall(text)) if c.isdecimal()}:
            text = text.replace(digit, str(unicodedata.decimal(digit)))
    if _MAYBE_THOUSANDS.search(text):
        text = _THOUSANDS.sub(lambda match: _SEPARATOR.sub("", match.group()), text)
    return _FRACTION_OF_DIGITS.sub(r"\1 \2 ", text) if "frac" in text else text
