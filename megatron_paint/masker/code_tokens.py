"""What tokens of source code are compared by: names as they are, numbers and strings by their value.

The functions never raise, on any text, and their time is linear.
"""

import re
from typing import Literal, NamedTuple

MOST_DIGITS = 300  # a longer number is compared as it is written
MOST_ZEROS = 30  # that are written out in a number's normal form

_BASED = re.compile(r"0([xXoObB])([0-9a-fA-F_']+)")
_DECIMAL = re.compile(r"([0-9][0-9_']*)?(?:\.([0-9][0-9_]*)?)?(?:[eE]([+-]?[0-9_]+))?")
_BASES = {"x": 16, "o": 8, "b": 2}
_OPENING = re.compile(r"([A-Za-z]{0,3})('''|\"\"\"|['\"`])")
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|u\{([0-9a-fA-F]{1,6})\}|(\r?\n)|([\s\S]))")
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "0": "\0", "a": "\a", "b": "\b", "f": "\f", "v": "\v"}
_LAST_CODE_POINT = 0x10FFFF

Kind = Literal["name", "keyword", "number", "string", "operator", "newline"]


class CodeToken(NamedTuple):
    """One token of source code. newline: the end of a statement or line."""

    kind: Kind
    text: str  # of a number and a string its value
    start: int  # in the source
    end: int


def number_value(text: str) -> str:
    """Returns a number in one form: 1_000, 1000.0, 1e3 and 0x3e8 are 1000. Suffixes as in 10L are left out."""
    based = _BASED.match(text)
    if based is not None:
        digits = based[2].replace("_", "").replace("'", "")
        try:
            return str(int(digits, _BASES[based[1].lower()])) if len(digits) <= MOST_DIGITS else text.lower()
        except ValueError:  # no digit of this base
            return text.lower()
    found = _DECIMAL.match(text)
    whole, fraction, exponent = ((part or "").replace("_", "").replace("'", "") for part in found.groups())
    digits = (whole + fraction).lstrip("0")
    if len(digits) > MOST_DIGITS or len(exponent) > 6:
        return text.lower()
    imaginary = "j" if text[found.end() : found.end() + 1] in ("j", "J") else ""
    power = int(exponent or 0) - len(fraction)
    stripped = digits.rstrip("0")
    power += len(digits) - len(stripped)
    if not stripped:
        return "0" + imaginary
    if 0 <= power <= MOST_ZEROS:
        return stripped + "0" * power + imaginary
    if -MOST_ZEROS <= power < 0:
        padded = stripped.rjust(1 - power, "0")
        return f"{padded[:power]}.{padded[power:]}{imaginary}"
    return f"{stripped}e{power}{imaginary}"


def string_value(text: str) -> str:
    """Returns the value of a string literal: without prefix and quotation marks, with its escapes resolved."""
    opening = _OPENING.match(text)
    if opening is None:
        return text
    value = text[opening.end() :].removesuffix(opening[2])
    return value if "r" in opening[1].lower() else unescaped(value)


def unescaped(text: str) -> str:
    r"""Returns a text with its escapes resolved: \n, \x41, \u0041, \u{41} and others. Unknown ones stay."""
    return _ESCAPE.sub(_escaped, text) if "\\" in text else text


def _escaped(match: re.Match[str]) -> str:
    code = match[1] or match[2] or match[3]
    if code:
        number = int(code, 16)
        return chr(number) if number <= _LAST_CODE_POINT else match.group()
    if match[4]:  # the line continues
        return ""
    letter = match[5]
    if letter in "\\'\"`":
        return letter
    return _ESCAPED.get(letter, match.group())
