r"""Reads numbers exactly and compares them: integers, decimals, fractions, mixed numbers, powers, percentages.

Two numbers that are written exactly agree only if they are equal. A decimal may also stand for a number that no decimal
can write, such as 1/3 or the square root of 2. Then it must agree in its first decimals and, near zero, relatively.
"""

import re
from dataclasses import dataclass, replace
from fractions import Fraction

MOST_CHARACTERS = 400
MOST_DIGITS, MOST_BITS = 8, 16_000  # of an exponent, and of the power that it makes

INTEGER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)"
DECIMAL = rf"(?:{INTEGER}(?:\.[0-9]*)?|\.[0-9]+)"
SIGNED = rf"[-+]?\s*{DECIMAL}"
FRACTION = rf"\\frac\s*\{{\s*({SIGNED})\s*\}}\s*\{{\s*({SIGNED})\s*\}}"
EXPONENT = r"\s*\{?\s*([-+]?\s*[0-9]+)\s*\}?"
LATEX_FRACTION = re.compile(rf"(?:({INTEGER})\s*)?{FRACTION}")
SLASH = re.compile(rf"(?:({INTEGER})\s+)?({DECIMAL})\s*/\s*({DECIMAL})")
SCIENTIFIC = re.compile(rf"({DECIMAL})\s*(?:(?:\\times|\\cdot|\*|x)\s*10\s*\^{EXPONENT}|[eE]([-+]?[0-9]+))")
POWER = re.compile(rf"({DECIMAL})\s*\^{EXPONENT}")
PLAIN = re.compile(DECIMAL)
WRAPPED = re.compile(r"\(([^()]*)\)|\{([^{}]*)\}")
SIGN = re.compile(r"([-+]?)\s*(.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Number:
    """A number as it is written."""

    value: Fraction  # of a percentage: the number before the sign
    decimal: bool = False  # it has a decimal point, so it may be rounded
    percent: bool = False
    commas: bool = False  # it has commas as separators of thousands; it may be a list


def read_number(text: str) -> Number | None:
    """Returns the number that plain LaTeX writes; None if it is anything else, or too large to compute."""
    text = text.strip()
    if not text or len(text) > MOST_CHARACTERS:
        return None
    if text.endswith("%"):
        number = read_number(text[:-1].removesuffix("\\"))
        return None if number is None or number.percent else replace(number, percent=True)
    if wrapped := WRAPPED.fullmatch(text):
        return read_number(wrapped[1] if wrapped[1] is not None else wrapped[2])
    sign, size = SIGN.fullmatch(text).groups()
    value = _size(size)
    if value is None:
        return None
    return Number(-value if sign == "-" else value, decimal=bool(re.search(r"\.[0-9]", size)), commas="," in size)


def numbers_agree(gold: Number, given: Number, *, precision: int) -> bool:
    """Tells whether two numbers agree. precision: decimals in which a rounded decimal must agree.

    The percent sign is optional where the number before it is an integer or is larger than 1.
    """
    if gold.percent == given.percent:
        return values_agree(gold.value, gold.decimal, given.value, given.decimal, precision=precision)
    percent, plain = (gold, given) if gold.percent else (given, gold)
    if values_agree(percent.value / 100, percent.decimal, plain.value, plain.decimal, precision=precision):
        return True
    whole = percent.value.denominator == plain.value.denominator == 1
    return (whole or abs(plain.value) > 1) and percent.value == plain.value


def values_agree(a: Fraction, a_decimal: bool, b: Fraction, b_decimal: bool, *, precision: int) -> bool:
    """Tells whether two values are equal, or one is a decimal that stands for the other, which no decimal can write."""
    if a == b:
        return True
    stands_for = (a_decimal and not has_decimal(b)) or (b_decimal and not has_decimal(a))
    return stands_for and close(a, b, precision=precision)


def close(a: Fraction, b: Fraction, *, precision: int) -> bool:
    """Tells whether two values are equal after rounding to `precision` decimals, and also relatively near.

    Their difference is at most 10^(1 - precision) of the larger one: 10^-5 with six decimals.
    """
    return round(a, precision) == round(b, precision) and abs(a - b) * 10 ** (precision - 1) <= max(abs(a), abs(b))


def has_decimal(value: Fraction) -> bool:
    """Tells whether a decimal can write the value exactly."""
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest == 1


def _size(text: str) -> Fraction | None:
    """The value of a number without its sign."""
    if PLAIN.fullmatch(text):
        return _decimal(text)
    if match := LATEX_FRACTION.fullmatch(text) or SLASH.fullmatch(text):
        whole, top, bottom = match.groups()
        top, bottom = _decimal(top), _decimal(bottom)
        if not bottom or (whole and (top < 0 or bottom < 0)):
            return None
        return _decimal(whole or "0") + top / bottom
    if match := SCIENTIFIC.fullmatch(text):
        return _power(Fraction(10), match[2] or match[3], factor=_decimal(match[1]))
    if match := POWER.fullmatch(text):
        return _power(_decimal(match[1]), match[2])
    return None


def _decimal(text: str) -> Fraction:
    text = "".join(text.split()).replace(",", "")
    return Fraction(text.removesuffix(".") if text[-1] == "." else text)


def _power(base: Fraction, exponent: str, *, factor: Fraction = Fraction(1)) -> Fraction | None:
    digits = "".join(exponent.split())
    power = int(digits) if len(digits) < MOST_DIGITS else None
    bits = base.numerator.bit_length() + base.denominator.bit_length()
    if power is None or abs(power) * bits > MOST_BITS or (base == 0 and power <= 0):
        return None
    return factor * base**power
