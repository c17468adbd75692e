r"""Reads repeating decimals as fractions: `0.\overline{3}`, `0.\dot{3}`, `0.1\bar{6}`, `0.(3)`, `0.333\ldots`."""

import re
from fractions import Fraction

DIGIT = r"(?:\\dot\s*\{([0-9])\}|\\dot\s*([0-9]))"
BAR = re.compile(r"(?<![0-9.,])([0-9]*)\.([0-9]*)\\(?:overline|bar|overbar)\s*(?:\{\s*([0-9]+)\s*\}|([0-9]))")
DOTS_OVER = re.compile(rf"(?<![0-9.,])([0-9]*)\.([0-9]*){DIGIT}(?:([0-9]*){DIGIT})?")
PARENTHESES = re.compile(r"([-+]?)([0-9]+)\.([0-9]*)\(([0-9]+)\)")
CONTINUED = re.compile(r"(?<![0-9.,])([0-9]*)\.([0-9]+?)\s*\\ldots(?![A-Za-z])")
MOST_DIGITS = 40  # of a decimal that continues; the search for its period is cubic
LONG = 7  # decimals; fewer do not say which number is meant
REPEATED = re.compile(r"([0-9]*?)([0-9])\2{2,}|([0-9]*?)([0-9]{2,}?)(?:\4)+")


def repeating_as_fractions(text: str) -> str:
    r"""Returns the text with `\frac{n}{d}` in place of each repeating decimal.

    `0.(3)` counts only as the complete answer, because `0.5(3)` in a formula is a product. `0.333\ldots` repeats its
    last digit if it is there three times, or its last group of digits if it is there twice. A longer decimal that does
    not repeat, as `3.14159265\ldots`, loses its dots.
    """
    if "." not in text:
        return text
    if alone := PARENTHESES.fullmatch(text.strip()):
        return alone[1] + _latex(alone[2], alone[3], alone[4])
    text = BAR.sub(lambda match: _latex(match[1], match[2], match[3] or match[4]), text)
    text = DOTS_OVER.sub(_under_dots, text)
    return CONTINUED.sub(_continued, text) if "\\ldots" in text else text


def _under_dots(match: re.Match[str]) -> str:
    whole, fixed, *groups = match.groups(default="")
    first, between, last = groups[0] or groups[1], groups[2], groups[3] or groups[4]
    return _latex(whole, fixed, first + between + last)


def _continued(match: re.Match[str]) -> str:
    pattern = REPEATED.fullmatch(match[2]) if len(match[2]) <= MOST_DIGITS else None
    if pattern is None:
        return match[0] if len(match[2]) < LONG else f"{match[1]}.{match[2]}"
    return _latex(match[1], pattern[1] or pattern[3] or "", pattern[2] or pattern[4])


def _latex(whole: str, fixed: str, repeated: str) -> str:
    """The fraction of whole.fixed(repeated)."""
    value = int(whole or "0") + Fraction(int(fixed or "0"), 10 ** len(fixed))
    value += Fraction(int(repeated), 10 ** len(fixed) * (10 ** len(repeated) - 1))
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
