r"""Separates the unit from an answer, and compares units: `12\text{ cm}`, `\$5`, `60^\circ`, `3 \text{ square feet}`.

A missing unit is no mistake, because the problem often names it. Two known units must be of one kind; then values are
converted. An unknown unit, such as apples, is not compared.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

from megatron_paint.grading.normal_form import PLAIN_TEXT


def _table() -> dict[str, tuple[str, Fraction]]:
    """Every known name: its kind, and its size in the first unit of that kind."""
    kinds = {
        "length": "m meter metre:1 dm decimeter:0.1 cm centimeter centimetre:0.01 mm millimeter millimetre:0.001 "
        "km kilometer kilometre:1000 in inch inches:0.0254 ft foot feet:0.3048 yd yard:0.9144 mi mile:1609.344",
        "mass": "g gram:1 mg milligram:0.001 kg kilogram kilo:1000 lb lbs:453.59237 oz ounce:28.349523125",
        "time": "s sec second:1 ms millisecond:0.001 min minute:60 h hr hour:3600 day:86400 week:604800",
        "months": "month:1 year yr:12",
        "angle": "degree deg \\circ:1",
        "volume": "l L liter litre:1 ml mL milliliter millilitre:0.001 gallon gal:3.785411784 quart:0.946352946",
        "dollar": "dollar usd \\$ $:1 cent ¢:0.01",
        "euro": "euro eur €:1",
        "pound": "£ gbp:1",
        "rupee": "rupee rs rs. inr ₹:1",
        "yen": "yen jpy ¥:1",
        "celsius": "celsius \\circc:1",
        "fahrenheit": "fahrenheit \\circf:1",
        "force": "N newton:1",
        "energy": "J joule:1",
        "power": "W watt:1",
        "voltage": "V volt:1",
        "frequency": "Hz hertz:1",
    }
    found = {}
    for kind, names in kinds.items():
        pending: list[str] = []
        for word in names.split():
            name, colon, size = word.partition(":")
            pending.append(name)
            if colon:
                found |= {each: (kind, Fraction(size)) for each in pending}
                pending = []
    # A speed has two kinds; its short names are written out.
    return found


UNITS = _table()
SHORT_SPEEDS = {"mph": "mile per hour", "kph": "km per hour", "kmph": "km per hour", "kmh": "km per hour"}
SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
# Words in a text that make it more than a unit.
NO_UNIT = re.compile(
    r"\b(?:and|or|if|when|where|mod|for|more|less|least|most|than|not?|is|are|was|even|odd|except|unless|to|only|about)\b",
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
DEGREE_UNIT = re.compile(r"\s*\^\\circ\s*(?:\\text\{\s*([CF])\s*\}|([CF]))?$")
COMMAND = re.compile(r"\\([A-Za-z]+)\s*$")
FACTOR = re.compile(
    r"(square|sq|cubic|cu)?\.? ?(\\?[A-Za-z$¢€£¥₹]+\.?)(?: ?\^ ?\{? ?(-?[0-9]) ?\}?| (squared|cubed))?\Z"
)
HAS_VALUE = re.compile(r"[0-9]|\\pi|\\sqrt|\\infty")


@dataclass(frozen=True, slots=True)
class Unit:
    """What a unit measures, and its size."""

    kinds: tuple[tuple[str, int], ...] | None  # (kind, exponent), sorted; None: not known
    size: Fraction = Fraction(1)
    scale: int = 1  # of "million" before the unit


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
    kinds: dict[str, int] = {}
    size, sign = Fraction(1), 1
    for part in re.split(r"(\s*/\s*|\s+per\s+|\s+an?\s+)", words):
        if re.fullmatch(r"\s*/\s*|\s+per\s+|\s+an?\s+", part):
            sign = -1
            continue
        for factor in _factors(part.strip()):
            known = _factor(factor)
            if known is None:
                return Unit(None, scale=scale)
            kind, one, exponent = known
            kinds[kind] = kinds.get(kind, 0) + sign * exponent
            size *= one ** (sign * exponent)
    return Unit(tuple(sorted((kind, number) for kind, number in kinds.items() if number)), size, scale)


def _factors(part: str) -> list[str]:
    """The factors of a product of units: "square feet" is one, "kg m" are two."""
    return re.findall(
        r"(?:(?:square|sq|cubic|cu)\.? )?[^\s^]+(?: ?\^ ?\{? ?-?[0-9] ?\}?| squared| cubed)?", part, re.IGNORECASE
    )


def _factor(text: str) -> tuple[str, Fraction, int] | None:
    """(kind, size, exponent) of one factor; None if its word is not known."""
    match = FACTOR.match(text) or FACTOR.match(text.lower())
    if match is None:
        return None
    before, word, power, after = match.groups()
    exponent = int(power or 1) * {"square": 2, "sq": 2, "cubic": 3, "cu": 3}.get((before or "").lower(), 1)
    exponent *= {"squared": 2, "cubed": 3}.get(after or "", 1)
    known = _known(word)
    return None if known is None else (*known, exponent)


def _known(word: str) -> tuple[str, Fraction] | None:
    lower = word.lower()
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
    return Unit(unit.kinds, unit.size, unit.scale * scale)
