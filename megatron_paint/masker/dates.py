"""Dates of a text in one form: 5 March 2020, March 5th, 2020, 2020-03-05 and 5.3.2020 are 2020-03-05.

The rules are ours and for English. Of `3/4/2020`, the order of day and month is not known; it is compared as written.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

_MONTH_NAMES = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
_MONTH_NUMBERS = {name[:3]: number for number, name in enumerate(_MONTH_NAMES, start=1)}
_MONTH = r"(?:Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?|Sept?(?:ember)?"
_MONTH += r"|Oct(?:ober)?|Nov(?:ember)?|Dec(?:ember)?)\b\.?"
_DAY = r"[0-9]{1,2}(?:st|nd|rd|th)?"
_YEAR = r"[0-9]{4}(?![0-9])"
_DATE = re.compile(
    r"(?<![\w/.-])(?:"
    r"(?P<iso>[0-9]{4}-[0-9]{1,2}-[0-9]{1,2})(?![0-9-])"
    r"|(?P<dotted>[0-9]{1,2}\.[0-9]{1,2}\.[0-9]{4})(?![0-9])"
    r"|(?P<slashed>[0-9]{1,2}/[0-9]{1,2}/[0-9]{4})(?![0-9/])"
    rf"|(?P<day_first>{_DAY}(?:[ ]of)?[ ]{_MONTH}(?:,?[ ]{_YEAR})?)"
    rf"|(?P<month_first>{_MONTH}[ ]{_DAY}(?![0-9:%]|[.,][0-9])(?:,?[ ]{_YEAR})?)"
    rf"|(?P<month_alone>{_MONTH},?[ ]{_YEAR})"
    r")"
)
_DIGITS = re.compile(r"[0-9]+")
_MONTH_START = re.compile(r"[A-Z][a-z]{2}")


class Date(NamedTuple):
    """A date of a text: text[start:end]."""

    text: str  # 2020-03-05; without a year --03-05; without a day 2020-03
    start: int
    end: int

    @property
    def forms(self) -> tuple[str, ...]:
        """The date, and the parts of a complete one that may stand for it: day with month, month with year."""
        complete = len(self.text) == len("2020-03-05") and self.text.count("-") == 2 and self.text[0] != "-"
        return (self.text, f"-{self.text[4:]}", self.text[:7]) if complete else (self.text,)


def dates_in(text: str) -> Iterator[Date]:
    """Yields the dates of a text in order. A number that no month or day can have makes none."""
    for match in _DATE.finditer(text):
        normal = _normal_form(match)
        if normal is not None:
            yield Date(normal, match.start(), match.end())


def _normal_form(match: re.Match[str]) -> str | None:
    kind, written = match.lastgroup, match.group()
    numbers = [int(digits) for digits in _DIGITS.findall(written)]
    if kind == "iso":
        year, month, day = numbers
    elif kind == "dotted":
        day, month, year = numbers
    elif kind == "slashed":
        first, second, year = numbers
        if first <= 12 and second <= 12 and first != second:
            return f"{first}/{second}/{year}"
        day, month = (first, second) if second <= 12 else (second, first)
    else:
        month = _MONTH_NUMBERS[_MONTH_START.search(written).group()]
        if kind == "month_alone":
            return f"{numbers[0]:04d}-{month:02d}"
        day, year = numbers[0], numbers[1] if len(numbers) > 1 else None
    if not (1 <= month <= 12 and 1 <= day <= 31):
        return None
    return f"--{month:02d}-{day:02d}" if year is None else f"{year:04d}-{month:02d}-{day:02d}"
