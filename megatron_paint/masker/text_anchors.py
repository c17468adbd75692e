"""Anchors of a solution in prose: names, dates, quantities and quoted terms; boxed answers too. No model is used.

All rules are ours. Names, dates and units are those of English. The functions take plain text and return plain values.
Their time is linear in the text length. They never raise, on any text.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from megatron_paint.masker.anchors import TRIVIAL_NUMBERS, ExtractedAnchor, extract_boxes, find_math
from megatron_paint.masker.cut import Parts, merged
from megatron_paint.masker.dates import dates_in
from megatron_paint.masker.latex import Span, blank, boxes
from megatron_paint.masker.names import names_in
from megatron_paint.masker.quantities import quantities_in
from megatron_paint.masker.substring import NormalisedText, find_substrings

_QUOTED = re.compile(
    "\u201c([^\u201c\u201d\n]{2,200})\u201d|\u201e([^\u201e\u201c\n]{2,200})\u201c|\u00ab([^\u00ab\u00bb\n]{2,200})\u00bb"
    '|\u2018([^\u2018\u2019\n]{2,200})\u2019|(?<!\\w)"([^"\n]{2,200})"(?!\\w)|`([^`\n]{2,200})`'
)
_PUNCTUATION = ".,;:!?"


class _Place(NamedTuple):
    kind: str
    text: str
    start: int
    end: int


def extract_text(problem: str, solution: str) -> tuple[ExtractedAnchor, ...]:
    """Returns the anchors of a solution: boxes, dates, quantities, quoted terms and names, each kind in order.

    Nothing counts that the problem has too, and no number 0, 1 or 2 without a unit. Anchors with the same text appear
    once.
    """
    found: dict[str, dict[str, None]] = {kind: {} for kind in ("date", "quantity", "quote", "name")}
    for place in _places(solution):
        found[place.kind].setdefault(place.text)
    texts = [ExtractedAnchor(kind, text, False) for kind, those in found.items() for text in those]
    given = dict(zip(texts, find_text(tuple(texts), problem), strict=True))
    extracted = {anchor.text: anchor for anchor in extract_boxes(solution)}
    for anchor in texts:
        if not given[anchor] and anchor.text not in TRIVIAL_NUMBERS:
            extracted.setdefault(anchor.text, anchor)
    return tuple(extracted.values())


def find_text(anchors: tuple[ExtractedAnchor, ...], rollout: str) -> tuple[bool, ...]:
    """Tells for each anchor whether the rollout contains it.

    A date may be written in any form. So may a quantity; a number without a unit is found with one too. Names and
    quoted terms must have the same words, and names the same capitals.
    """
    if not anchors:
        return ()
    boxed = tuple(anchor for anchor in anchors if anchor.kind == "boxed")
    found = dict(zip(boxed, find_math(boxed, rollout), strict=True))
    flat = _without_boxes(rollout)
    dates = list(dates_in(flat))
    values = {form for date in dates for form in date.forms}
    numbers = blank(flat, [(date.start, date.end) for date in dates])
    values |= {text for one in quantities_in(numbers) for text in (one.text, one.value)}
    names = _passages(anchors, "name")
    there = find_substrings(NormalisedText(flat.split()), list(set(names.values())))
    quotes = _passages(anchors, "quote")
    quoted = find_substrings(NormalisedText(flat.casefold().split()), list(set(quotes.values())))
    for anchor in anchors:
        match anchor.kind:
            case "name":
                found[anchor] = names[anchor] in there
            case "quote":
                found[anchor] = quotes[anchor] in quoted
            case "date" | "quantity":
                found[anchor] = anchor.text in values
    return tuple(found[anchor] for anchor in anchors)


def text_parts(solution: str) -> Parts:
    """Returns the boxes, and the places of all other anchors. A `$` is a currency sign here and opens no formula."""
    places = [Span(place.start, place.start, place.end, place.end) for place in _places(solution)]
    return Parts(merged(boxes(solution)), merged(places))


def _places(text: str) -> Iterator[_Place]:
    """Yields everything in a text outside its boxes that may be an anchor, kind by kind."""
    boxed = [(box.start, box.end) for box in boxes(text)]
    flat = blank(text, boxed)
    dates = list(dates_in(flat))
    for date in dates:
        yield _Place("date", date.text, date.start, date.end)
    for quantity in quantities_in(blank(flat, [(date.start, date.end) for date in dates])):
        yield _Place("quantity", quantity.text, quantity.start, quantity.end)
    quotes = list(_QUOTED.finditer(flat))
    for match in quotes:
        term = next(group for group in match.groups() if group)
        words = " ".join(term.casefold().split()).rstrip(_PUNCTUATION)
        if any(map(str.isalnum, words)):
            yield _Place("quote", words, match.start(), match.end())
    # A name does not continue behind a box or a quoted term. As before a first word, a bracket begins no sentence.
    for name in names_in(blank(text, [*boxed, *(match.span() for match in quotes)], "(")):
        yield _Place("name", name.text, name.start, name.end)


def _without_boxes(text: str) -> str:
    """Returns the text, of the same length, with spaces in place of box markup. The contents of boxes stay."""
    ranges = [edge for box in boxes(text) for edge in ((box.start, box.content_start), (box.content_end, box.end))]
    return blank(text, ranges)


def _passages(anchors: tuple[ExtractedAnchor, ...], kind: str) -> dict[ExtractedAnchor, str]:
    """Returns what is searched for: the words of each anchor of a kind, without white space."""
    return {anchor: "".join(anchor.text.split()) for anchor in anchors if anchor.kind == kind}
