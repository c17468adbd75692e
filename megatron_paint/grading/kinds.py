r"""Decides comparisons of answers that math-verify reads wrongly or slowly, by the kind of answer.

A kind either decides, or it rewrites the pair for the next kind (a choice with its value, a number with its unit), or
it leaves the pair alone. What is left is a question to math-verify.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction

from megatron_paint.grading.boxes import last_boxes
from megatron_paint.grading.lists import NAMED
from megatron_paint.grading.normal_form import PLAIN_TEXT, plain_latex, same_text, without_text_commands
from megatron_paint.grading.numbers import Number, numbers_agree, read_number
from megatron_paint.grading.units import Quantity, Unit, split_unit

RESULT = re.compile(r"####\s*([^\n]*)")  # GSM8K ends a worked solution with this line


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers in plain LaTeX that are compared."""

    gold: str
    given: str


Verdict = bool | Pair  # True, False, or a pair that is still a question

CHOICE_WORD = r"(?:(?:the |correct |final )*(?:option|choice|answer)(?: is)?:?\s+)?"
LABEL = rf"{CHOICE_WORD}(?:\(\s*([A-J])\s*\)|\[\s*([A-J])\s*\]|([A-J]))"
CHOICE = re.compile(rf"{LABEL}[.:)]?", re.IGNORECASE)
LABEL_AND_VALUE = re.compile(
    r"(?:\(\s*([A-J])\s*\)(?:\s*[.:])?|([A-J])\s*[.:)])(\s*)"
    r"(?![-+]?\s*\\(?:cup|cap|in|to|times|cdot|le|ge|neq)(?![A-Za-z]))([^\s].*)",
    re.DOTALL,
)
NOT_A_VALUE = re.compile(r"[*/^_=<>,;|!')+]")
ANOTHER_LABEL = re.compile(r"\([A-J]\)|(?<![A-Za-z])[A-J]\s*[:.)]")

BASE_NAMES = "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
BASE_WORDS = {word: number for number, word in enumerate(BASE_NAMES.split(), start=2)}
BASE_WORDS |= {"binary": 2, "octal": 8, "decimal": 10, "hexadecimal": 16, "hex": 16}
NUMERAL = r"(-?\s*(?:[0-9A-Za-z]+(?:\s[0-9A-Za-z]+)*(?:\.[0-9A-Za-z]+)?))"
WRAPPED_NUMERAL = rf"(?:\(\s*{NUMERAL}\s*\)|\{{\s*{NUMERAL}\s*\}}|{NUMERAL})"
IN_BASE = re.compile(
    rf"{WRAPPED_NUMERAL}\s*(?:_\s*\{{?\s*\(?(?:\s*base)?\s*([0-9]{{1,2}}|[a-z]+)\s*\)?\s*\}}?"
    r"|,?\s*\(?(?:in )?base[- ]?\{?([0-9]{1,2}|[a-z]+)\}?\)?|\s+in ([a-z]+))",
    re.IGNORECASE,
)
PLAIN_NUMERAL = re.compile(r"-?[0-9A-Fa-f]+(?:\.[0-9A-Fa-f]+)?")
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
BASE_TOKEN = re.compile(r"[0-9A-F]\)?\s*_\s*\{?\s*[0-9]{1,2}(?![0-9])")

CLOCK = re.compile(r"([0-9]{1,2})(?::([0-5][0-9]))?(?::([0-5][0-9]))?\s*([ap])?\.?\s*(m)?\.?", re.IGNORECASE)
RATIO_NAME = re.compile(r"[A-Za-z](?:\s*:\s*[A-Za-z])+\s*=")

WORDS = re.compile(r"[^\W\d_]+(?:[\s\-/.']+[^\W\d_]+)*\.?")
DEGREES, RADIANS, STERLING = ((("angle", 1),), (("radian", 1),), (("sterling", 1),))
SIMILAR = [{DEGREES, (("celsius", 1),)}, {DEGREES, (("fahrenheit", 1),)}]  # a degree of a temperature has no name
UNNAMED = re.compile(r"\bunit\b")
SHORT_NAME = 2  # letters of an abbreviation
IN_AN_ORDER = re.compile("[A-Z]{2,}")  # the letters of throws, colors or points in their order, as HTH
PRIME_COMMAND = re.compile(r" ?\^ ?\{ ?(?:\\prime ?)+\}| ?\^ ?\\prime(?![A-Za-z]) ?")
PRIMED = re.compile(r"[A-Za-z)\]}]'+")
SHORT_WORD = 3  # letters that may be a product of variables, as abc and cab are


def reference(answer: str) -> str:
    r"""Returns the final answer of a gold answer that is a complete solution: after `####`, or in its last boxes."""
    results = RESULT.findall(answer)
    if results and results[-1].strip():
        return results[-1].strip()
    return (", ".join(last_boxes(answer)) or answer) if "\\boxed" in answer else answer


def decide(gold: str, given: str, *, precision: int) -> Verdict:
    """Compares two answers. Returns a verdict, or the pair that math-verify must compare.

    The pair is in plain LaTeX, without choice letters and units. precision: decimals in which a rounded decimal must
    agree.
    """
    pair: Verdict = Pair(plain_latex(gold), plain_latex(given))
    kinds: tuple[Callable[[Pair], Verdict], ...] = (
        of_choices,
        of_bases,
        of_clock_times,
        of_ratios,
        of_named_numbers,
        lambda both: of_numbers(both, precision=precision),
        of_words,
        of_primes,
    )
    for kind in kinds:
        pair = kind(pair)
        if isinstance(pair, bool):
            return pair
    return True if same_text(pair.gold, pair.given) else pair


def of_choices(pair: Pair) -> Verdict:
    """A letter with its value answers the letter and the value."""
    gold, given = _label_and_value(pair.gold), _label_and_value(pair.given)
    if gold is None and given is None:
        letters = _letter(pair.gold), _letter(pair.given)
        return pair if None in letters or len(pair.gold) == len(pair.given) == 1 else letters[0] == letters[1]
    if gold is not None and given is not None:
        return gold[0] == given[0] and Pair(gold[1], given[1])
    if given is not None:
        letter = _letter(pair.gold)
        return Pair(pair.gold, given[1]) if letter is None else letter == given[0]
    letter = _letter(pair.given)
    return Pair(gold[1], pair.given) if letter is None else letter == gold[0]


def _label_and_value(text: str) -> tuple[str, str] | None:
    """The letter and the value of "(B) 12" or "B. 12"."""
    match = LABEL_AND_VALUE.fullmatch(without_text_commands(text))
    if match is None:
        return None
    first, second, space, value = match.groups()
    if NOT_A_VALUE.match(value) or (value[0] == "-" and not space) or ANOTHER_LABEL.search(value):
        return None
    return first or second, value


def _letter(text: str) -> str | None:
    match = CHOICE.fullmatch(without_text_commands(text))
    if match is None:
        return None
    return next(group for group in match.groups() if group).upper()


def of_bases(pair: Pair) -> Verdict:
    """Numerals with a base agree if base and digits agree. A numeral without its base agrees by its digits."""
    gold, given = _numeral(pair.gold), _numeral(pair.given)
    if gold is None and given is None:
        return pair
    if gold is not None and given is not None:
        return gold == given
    (digits, base), other = (gold, pair.given) if gold is not None else (given, pair.gold)
    plain = _without_name(other).replace(" ", "")
    if not PLAIN_NUMERAL.fullmatch(plain):
        return pair
    return _same_digits(plain) == digits if base != 10 else read_number(plain) == read_number(digits)


def _numeral(text: str) -> tuple[str, int] | None:
    r"""(digits, base) of `101_2`, `(101)_{\text{two}}` or "101 in base 2"."""
    match = IN_BASE.fullmatch(_without_name(without_text_commands(text).replace("{ ", "{").replace(" }", "}")))
    if match is None:
        return None
    base_text = match[4] or match[5] or match[6]
    base = int(base_text) if base_text.isdigit() else BASE_WORDS.get(base_text.lower(), 0)
    digits = _same_digits("".join((match[1] or match[2] or match[3]).split()))
    allowed = DIGITS[:base] + "-."
    if not 2 <= base <= len(DIGITS) or not re.search("[0-9]", digits) or not set(digits) <= set(DIGITS + "-."):
        return None
    if any(character not in allowed for character in digits) and re.search("[a-z]", digits):
        return None
    return digits, base


def _same_digits(digits: str) -> str:
    sign = "-" if digits.startswith("-") else ""
    return sign + (digits.removeprefix("-").lower().lstrip("0") or "0")


def of_clock_times(pair: Pair) -> Verdict:
    """Times of day agree by hour, minute and second. "a.m." and "p.m." count if both have them."""
    gold, given = _clock(pair.gold), _clock(pair.given)
    if gold is None or given is None:
        return pair
    if bool(gold[1]) == bool(given[1]):
        return gold == given
    (time, half), (other, _) = (gold, given) if gold[1] else (given, gold)
    return other in (time, (time[0] % 12 + 12 * (half == "p"), *time[1:]))


def _clock(text: str) -> tuple[tuple[int, int, int], str] | None:
    match = CLOCK.fullmatch(without_text_commands(text))
    if match is None or bool(match[4]) != bool(match[5]) or not (match[2] or match[4]) or int(match[1]) > 24:
        return None
    return (int(match[1]), int(match[2] or 0), int(match[3] or 0)), (match[4] or "").lower()


def of_ratios(pair: Pair) -> Verdict:
    """Ratios agree if they are proportional. A ratio of two numbers also agrees with their quotient."""
    gold, given = _ratio(pair.gold), _ratio(pair.given)
    if gold is None or given is None or len(gold) == len(given) == 1:
        return pair
    if 1 in (len(gold), len(given)):
        ratio, (value,) = (gold, given) if len(given) == 1 else (given, gold)
        return len(ratio) == 2 and ratio[0] == value * ratio[1]
    return len(gold) == len(given) and all(
        a * other_b == b * other_a
        for a, other_a in zip(gold, given, strict=True)
        for b, other_b in zip(gold, given, strict=True)
    )


def _ratio(text: str) -> list[Fraction] | None:
    """The numbers between colons, none of them 0; a number without a colon is a list of one."""
    named = RATIO_NAME.match(text)
    parts = text[named.end() if named else 0 :].split(":")
    numbers = [read_number(part) for part in parts] if len(parts) < 10 else [None]
    if any(number is None or number.percent for number in numbers):
        return None
    values = [number.value for number in numbers]
    return values if len(values) == 1 or all(values) else None


def of_named_numbers(pair: Pair) -> Verdict:
    """`x = 5` agrees with 5 and with `x = 5`, but not with `y = 5`."""
    gold, given = NAMED.fullmatch(pair.gold), NAMED.fullmatch(pair.given)
    if (gold is None and given is None) or (gold and given and gold[1] != given[1]):
        return pair
    values = Pair(gold[2] if gold else pair.gold, given[2] if given else pair.given)
    numbers = [read_number(split_unit(text).value) for text in (values.gold, values.given)]
    return pair if None in numbers else values


def of_numbers(pair: Pair, *, precision: int) -> Verdict:
    """Numbers agree exactly, after their units are converted. An expression only loses its unit."""
    letters = not re.search("[A-Za-z]", pair.gold)
    gold, given = split_unit(pair.gold), split_unit(pair.given, letters=letters)
    gold, given = _in_degrees(gold, given.unit), _in_degrees(given, gold.unit)
    factors = _conversion(gold.unit, given.unit)
    if factors is None:
        return False
    a, b = read_number(gold.value), read_number(given.value)
    if a is None or b is None:
        return Pair(_times(factors[0], gold.value), _times(factors[1], given.value))
    if _percent_of_a_unit(a, b, given.unit) or _percent_of_a_unit(b, a, gold.unit):
        return False
    a, b = (_scaled(number, factor) for number, factor in zip((a, b), factors, strict=True))
    agree = numbers_agree(a, b, precision=precision)
    return Pair(gold.value, given.value) if not agree and (a.commas or b.commas) else agree


def _percent_of_a_unit(percentage: Number, other: Number, unit: Unit | None) -> bool:
    """Tells whether the other number is none of percent but of a unit. A number word, as "million", is no unit."""
    return percentage.percent and not other.percent and unit is not None and unit.kinds != ()


def _in_degrees(quantity: Quantity, other: Unit | None) -> Quantity:
    """The quantity in degrees if it is in radians and the other one is in degrees."""
    if quantity.unit is None or other is None or (quantity.unit.kinds, other.kinds) != (RADIANS, DEGREES):
        return quantity
    return Quantity(rf"\frac{{180}}{{\pi}}({quantity.value})", other)


def _scaled(number: Number, factor: Fraction) -> Number:
    return replace(number, value=number.value * factor)


def _conversion(gold: Unit | None, given: Unit | None) -> tuple[Fraction, Fraction] | None:
    """The factors that bring both values to one unit; None if the units measure different things."""
    scales = Fraction(gold.scale if gold else 1), Fraction(given.scale if given else 1)
    if gold is None or given is None or () in (gold.kinds, given.kinds):
        return scales
    if gold.kinds is None or given.kinds is None:
        return scales if _may_be_one(gold, given) else None
    if {gold.kinds, given.kinds} in SIMILAR or _are_pounds(gold, given) or _are_pounds(given, gold):
        return scales
    if gold.kinds != given.kinds:
        return None
    return (scales[0], scales[1]) if gold.size == given.size else (scales[0] * gold.size, scales[1] * given.size)


def _may_be_one(gold: Unit, given: Unit) -> bool:
    """Two unknown units must have the same words. An unknown and a known one must, if the unknown one is short.

    "units" and "square units" name nothing and may be any unit.
    """
    if gold.name == given.name or UNNAMED.search(gold.name) or UNNAMED.search(given.name):
        return True
    unknown = gold if gold.kinds is None else given
    return gold.kinds != given.kinds and len(unknown.name) > SHORT_NAME


def _are_pounds(money: Unit, mass: Unit) -> bool:
    return money.kinds == STERLING and mass.name == "pound"


def _times(factor: Fraction, value: str) -> str:
    return value if factor == 1 else rf"\frac{{{factor.numerator}}}{{{factor.denominator}}}({value})"


def of_words(pair: Pair) -> Verdict:
    """Words agree letter by letter, without regard to case; math-verify compares them as products of letters."""
    gold, given = _words(pair.gold), _words(pair.given)
    if gold is None or given is None:
        return pair
    if (
        "\\text" in pair.gold + pair.given
        or max(len(gold), len(given)) > SHORT_WORD
        or IN_AN_ORDER.fullmatch(pair.gold)
    ):
        return gold == given
    return pair


def of_primes(pair: Pair) -> Verdict:
    """`f'(x)` is not `f(x)`, but math-verify drops the prime.

    If only one answer has a side before `=`, this side does not count.
    """
    gold, given = _with_apostrophes(pair.gold), _with_apostrophes(pair.given)
    values = [gold, given] if ("=" in gold) == ("=" in given) else [text.rpartition("=")[2] for text in (gold, given)]
    primes = [sorted(PRIMED.findall(PLAIN_TEXT.sub("", text))) for text in values]
    return Pair(gold, given) if primes[0] == primes[1] else False


def _with_apostrophes(text: str) -> str:
    return PRIME_COMMAND.sub(lambda match: "'" * match[0].count("prime"), text)


def _words(text: str) -> str | None:
    """The words in lower case, with single spaces; None for anything else, and for a single letter."""
    plain = without_text_commands(text)
    if "\\" in plain or not WORDS.fullmatch(plain):
        return None
    words = " ".join(plain.replace("-", " ").split()).rstrip(".").casefold()
    return words if len(words) > 1 else None


def _without_name(text: str) -> str:
    """The value of `x = 5` or `f(x) = 5`."""
    named = NAMED.fullmatch(text)
    return named[2].strip() if named else text
