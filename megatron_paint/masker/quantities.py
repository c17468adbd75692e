"""Quantities of a text in one form: 1,500 m and 1.5 km, $3 million and 3,000,000 dollars, 12 % and 12 percent.

Units are the grader's. The rules are ours. Numbers in words, and the abbreviation `in` of inch, are not read.
"""

import re
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from megatron_paint.grading.unit_table import SCALES
from megatron_paint.grading.units import Unit, read_unit

LONGEST_NUMBER = 40  # characters; a longer number is compared as it is written
MOST_DECIMALS = 12  # of a value that is written as a decimal and not as a fraction
NO_UNITS = frozenset(("in", "second", "a"))  # words that are units less often than words

_QUANTITY = re.compile(
    r"(?<![\w.])(?P<currency>US\$|[$€£¥₹]|(?:USD|EUR|GBP|INR|JPY)(?=[ ]?[0-9]))?[ ]?"
    r"(?P<number>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?)"
    r"(?:[ -]?(?P<scale>dozen|hundred|thousand|million|billion|trillion)\b)?"
    r"(?:[ ]?(?P<percent>%|percent\b|per[ ]cent\b)|[ -]?(?P<unit>[A-Za-z]{1,12}(?:/[A-Za-z]{1,6})?|[€£₹¢])(?!\w))?"
)
_CURRENCY = {"US$": "$", "GBP": "£", "INR": "₹", "JPY": "¥", "USD": "$", "EUR": "€"}


class Quantity(NamedTuple):
    """A quantity of a text: text[start:end]."""

    text: str  # value and unit
    value: str  # the value as it is written, without the unit
    start: int
    end: int


def quantities_in(text: str) -> Iterator[Quantity]:
    """Yields the quantities of a text in order. A number without a known unit is one too."""
    for match in _QUANTITY.finditer(text):
        number = match["number"].replace(",", "")
        if len(number) > LONGEST_NUMBER:
            yield Quantity(number, number, match.start("number"), match.end("number"))
            continue
        value = Fraction(number)
        end = match.end("number")
        if match["scale"]:
            value, end = value * SCALES[match["scale"]], match.end("scale")
        start = match.start("number")
        if match["percent"]:
            yield Quantity(f"{_plain(value)}%", _plain(value), start, match.end("percent"))
            continue
        unit = _unit(_CURRENCY.get(match["currency"], match["currency"])) if match["currency"] else None
        if unit is not None:
            start = match.start("currency")
        elif match["unit"] and (unit := _unit(match["unit"])) is not None:
            end = match.end("unit")
        elif text[end : end + 1].isalnum():  # 10th, 3D
            continue
        name = "" if unit is None else f" {_kinds(unit)}"
        yield Quantity(f"{_plain(value * (unit.size if unit else 1))}{name}", _plain(value), start, end)


@lru_cache(maxsize=4096)
def _unit(name: str) -> Unit | None:
    """Returns the unit of a name; None for a word that is none."""
    if name in NO_UNITS:
        return None
    unit = read_unit(name)
    return unit if unit.kinds and unit.scale == 1 else None


def _kinds(unit: Unit) -> str:
    return " ".join(kind if power == 1 else f"{kind}^{power}" for kind, power in unit.kinds or ())


def _plain(value: Fraction) -> str:
    shifted = value * 10**MOST_DECIMALS
    if shifted.denominator != 1:
        return f"{value.numerator}/{value.denominator}"
    digits = str(shifted.numerator).rjust(MOST_DECIMALS + 1, "0")
    return f"{digits[:-MOST_DECIMALS]}.{digits[-MOST_DECIMALS:]}".rstrip("0").rstrip(".")
