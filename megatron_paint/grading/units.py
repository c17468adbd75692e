r"""Separates the unit from an answer, and compares units: `12\text{ cm}`, `\$5`, `60^\circ`, `3 \text{ square feet}`.

A missing unit is no mistake, because the problem often names it. Two known units must be of one kind; then values are
converted. Two unknown units, such as apples, must have the same words.
"""

import re
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise

from megatron_paint.grading.normal_form import PLAIN_TEXT, without_text_commands
from megatron_paint.grading.unit_table import SCALES, SHORT_SPEEDS, UNITS

# Words in a text that make it more than a unit.
NO_UNIT = re.compile(
    r"\b(?:and|or|if|when|where|mod|for|more|less|least|most|than|not?|is|are|was|even|odd|except|unless|to|only|about|"
    r"above|below|factorial|half|halves|thirds?|quarters?|(?:four|fif|six|seven|eigh|nin|ten|hundred|thousand)ths?)\b"
    r"|\A\W*(?:text\W*)?(?:squared|cubed)\b",
    re.IGNORECASE,
)
ONE_LETTER = frozenset("mgshlLNJWV")

LONGEST = 100  # characters at the end of an answer that are searched for a unit
CURRENCY = re.compile(r"([-+]?)\s*(\\\$|[€£¥₹]|\\text\{\s*(?:Rs\.?|USD|EUR)\s*\}|(?:Rs\.?|USD|EUR)(?= ?[0-9]))\s*")
CURRENCY_AFTER = re.compile(r"\s*(\\\$|[€£¥₹¢])$")
POWER = r"(?:\s*\^\s*(?:\{\s*-?[0-9]\s*\}|[0-9]))?"
TEXT_UNIT = re.compile(
    rf"\s*(?:\\cdot\s*)?((?:\\text\{{[^{{}}]*\}}{POWER}\s*(?:/|\\cdot|\*)?\s*)*\\text\{{[^{{}}]*\}}{POWER})$"
)
RATIO_UNIT = re.compile(
    rf"\s*\\frac\s*\{{\s*(\\text\{{[^{{}}]*\}}{POWER})\s*\}}\s*\{{\s*(\\text\{{[^{{}}]*\}}{POWER})\s*\}}$"
)
WORD = r"[A-Za-z][A-Za-z.]*"
WORD_UNIT = re.compile(rf"(?<![A-Za-z\\.])({WORD}{POWER}(?:(?:\s*/\s*|\s+){WORD}{POWER}){{0,5}})$")
DEGREE_UNIT = re.compile(r"\s*\^\\circ\s*(?:\\text\{\s*(C(?:elsius)?|F(?:ahrenheit)?)\s*\}|([CF]))?$")
DEGREES_OF = re.compile(r"degrees? (?=(?:C|F|celsius|fahrenheit)\Z)", re.IGNORECASE)
COMPOUND = re.compile(r"(?:[0-9]+(?:\.[0-9]+)? ?[A-Za-z]+\.?(?: ?,| and)? ?){2,4}")  # 2 hours and 30 minutes
COMPOUND_PART = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?(?!and )([A-Za-z]+)")
COMMAND = re.compile(r"\\([A-Za-z]+)\s*$")
FACTOR = re.compile(
    r"(?:(square|sq|cubic|cu)(?:\. ?| ))?(\\?[A-Za-z$¢€£¥₹]+\.?)(?: ?\^ ?\{? ?(-?[0-9]) ?\}?| (squared|cubed))?\Z"
)
HAS_VALUE = re.compile(r"[0-9]|\\pi|\\sqrt|\\infty")


@dataclass(frozen=True, slots=True)
class Unit:
    """What a unit measures, and its size."""

    kinds: tuple[tuple[str, int], ...] | None  # (kind, exponent), sorted; None: not known
    size: Fraction = Fraction(1)
    scale: int = 1  # of "million" before the unit
    name: str = ""  # its words, in lower case and without the s of a plural


@dataclass(frozen=True, slots=True)
class Quantity:
    """An answer without its unit."""

    value: str  # plain LaTeX
    unit: Unit | None  # None: no unit is written


def split_unit(text: str, *, letters: bool = False) -> Quantity:
    r"""Separates the unit from an answer in plain LaTeX.

    letters: a single letter after a space, as in `12 m`, counts as a unit. Without a space it is a variable.
    """
    if found := CURRENCY.match(text):
        value = found[1] + text[found.end() :]
        rest = split_unit(value) if HAS_VALUE.search(value) else Quantity(value, None)
        scale = rest.unit.scale if rest.unit else 1
        return Quantity(rest.value, _scaled(read_unit(found[2]), scale))
    if compound := _compound(text):
        return compound
    before, tail = text[:-LONGEST], text[-LONGEST:]
    for pattern in (CURRENCY_AFTER, RATIO_UNIT, TEXT_UNIT, DEGREE_UNIT, WORD_UNIT):
        found = pattern.search(tail)
        if found is None:
            continue
        value, name = (before + tail[: found.start()]).rstrip(), _name(pattern, found)
        if pattern is TEXT_UNIT or pattern is RATIO_UNIT:
            value = value.removesuffix(r"\cdot").rstrip()
        unit = read_unit(name)
        if not _is_value(value) or not (unit.kinds or HAS_VALUE.search(value)):
            continue
        if pattern is WORD_UNIT and not _is_plain_unit(tail, found, unit, letters=letters):
            continue
        if NO_UNIT.search(name) is None:
            return Quantity(value, unit)
    return Quantity(text, None)


def read_unit(name: str) -> Unit:
    """Returns the unit of a text such as "square feet" or "km/h". An unknown word makes its kinds None."""
    words = " ".join(PLAIN_TEXT.sub(r" \1 ", name).replace(r"\cdot", " ").replace("*", " ").split())
    scale = 1
    while (first := words.split(" ")[0].lower()) in SCALES:
        scale *= SCALES[first]
        words = words[len(first) :].strip().removeprefix("of ").strip()
    if not words:
        return Unit((), scale=scale)
    words = SHORT_SPEEDS.get(words.lower().replace(".", ""), words)
    words = DEGREES_OF.sub(r"\\circ", words.replace("\\mu ", "u").replace("\\mu", "u"))
    name = _plain_words(words)
    kinds: dict[str, int] = {}
    size, sign = Fraction(1), 1
    for part in re.split(r"(\s*/\s*|\s+per\s+|\s+an?\s+)", words):
        if re.fullmatch(r"\s*/\s*|\s+per\s+|\s+an?\s+", part):
            sign = -1
            continue
        for factor in _factors(part.strip()):
            known = _factor(factor)
            if known is None:
                return Unit(None, scale=scale, name=name)
            kind, one, exponent = known
            kinds[kind] = kinds.get(kind, 0) + sign * exponent
            size *= one**sign
    return Unit(tuple(sorted((kind, number) for kind, number in kinds.items() if number)), size, scale, name)


def _plain_words(text: str) -> str:
    """The words of a unit in lower case, without articles and the s of a plural. A single letter keeps its case."""
    words = [word.strip(".,") if len(word) < 2 else _singular(word.strip(".,").casefold()) for word in text.split()]
    return " ".join(word for word in words if word not in ("", "of", "the", "a", "an"))


def _singular(word: str) -> str:
    if len(word) < 3 or word.endswith("ss"):
        return word
    return re.sub(r"(?<=[sxz])es\Z|(?<=[cs]h)es\Z|s\Z", "", re.sub(r"ies\Z", "ys", word))


def _compound(text: str) -> Quantity | None:
    r"""The quantity of `2\text{ hours }30\text{ minutes}` in its last unit. The units get smaller."""
    plain = without_text_commands(text)
    if len(plain) > LONGEST or not COMPOUND.fullmatch(plain):
        return None
    parts = [(Fraction(number), read_unit(word)) for number, word in COMPOUND_PART.findall(plain)]
    units = [unit for _, unit in parts]
    if not units[0].kinds or any(unit.kinds != units[0].kinds for unit in units):
        return None
    if any(large.size <= small.size for large, small in pairwise(units)):
        return None
    value = sum((number * unit.size for number, unit in parts), Fraction(0)) / units[-1].size
    return Quantity(rf"\frac{{{value.numerator}}}{{{value.denominator}}}", units[-1])


def _factors(part: str) -> list[str]:
    """The factors of a product of units: "square feet" is one, "kg m" are two."""
    return re.findall(
        r"(?:(?:square|sq|cubic|cu)\.? )?[^\s^]+(?: ?\^ ?\{? ?-?[0-9] ?\}?| squared| cubed)?", part, re.IGNORECASE
    )


def _factor(text: str) -> tuple[str, Fraction, int] | None:
    """(kind, size, exponent of the kind) of one factor; None if its word is not known."""
    match = FACTOR.match(text) or FACTOR.match(text.lower())
    if match is None:
        return None
    before, word, power, after = match.groups()
    exponent = int(power or 1) * {"square": 2, "sq": 2, "cubic": 3, "cu": 3}.get((before or "").lower(), 1)
    exponent *= {"squared": 2, "cubed": 3}.get(after or "", 1)
    known = _known(word)
    return None if known is None else (known[0], known[2] ** exponent, known[1] * exponent)


def _known(word: str) -> tuple[str, int, Fraction] | None:
    """Short names count in their own case, because M is not m, and mW is not MW."""
    lower = word.lower() if len(word.rstrip(".")) > 2 else word
    for name in (word, word.rstrip("."), lower, lower.rstrip("."), lower.rstrip(".").removesuffix("s")):
        if name in UNITS:
            return UNITS[name]
    return None


def _name(pattern: re.Pattern[str], found: re.Match[str]) -> str:
    if pattern is DEGREE_UNIT:
        return r"\circ" + (found[1] or found[2] or "")
    return f"{found[1]} / {found[2]}" if pattern is RATIO_UNIT else found[1]


def _is_value(text: str) -> bool:
    """Tells whether a text can stand before a unit."""
    if not text or not (text[-1].isalnum() or text[-1] in ")}!.]%"):
        return False
    command = COMMAND.search(text)
    return command is None or command[1] in ("pi", "infty")


def _is_plain_unit(text: str, found: re.Match[str], unit: Unit, *, letters: bool) -> bool:
    """Tells whether letters without a text command are a unit and no variables."""
    name = found[1].strip()
    base = name.split("^")[0].strip()
    spaced = text[: found.start()].endswith(" ")
    if len(base) == 1:
        return letters and spaced and base in ONE_LETTER
    words = [word for word in re.split(r"[\s/]+", base) if word]
    return unit.kinds is not None or (spaced and all(len(word.rstrip(".")) > 3 for word in words[:1]))


def _scaled(unit: Unit, scale: int) -> Unit:
    return replace(unit, scale=unit.scale * scale)
