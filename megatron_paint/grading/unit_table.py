"""The units that the grader knows, with their kinds and sizes, and words that multiply a number."""

from fractions import Fraction

# The sizes are in the first unit of a kind. A ton has 2,000 pounds, as in American problems; a tonne has 1,000 kg.
KINDS = {
    "length": "m meter metre:1 in inch inches:0.0254 ft foot feet:0.3048 yd yard:0.9144 mi mile:1609.344",
    "length^2": "acre:4046.8564224 ha hectare:10000",
    "length^3": "l L liter litre:0.001 cc:0.000001 gallon gal:0.003785411784 quart:0.000946352946 "
    "pint:0.000473176473 cup:0.0002365882365",
    "mass": "g gram:1 kilo:1000 lb lbs pound:453.59237 oz ounce:28.349523125 ton:907184.74 tonne t:1000000",
    "time": "s sec second:1 min minute:60 h hr hour:3600 day:86400 week:604800",
    "months": "month:1 year yr:12",
    "angle": "degree deg \\circ:1",
    "radian": "radian rad:1",
    "dollar": "dollar usd \\$ $:1 cent ¢:0.01",
    "euro": "euro eur €:1",
    "sterling": "£ gbp:1",
    "rupee": "rupee Rs rs rs. inr ₹:1",
    "yen": "yen jpy ¥:1",
    "celsius": "celsius \\circc \\circcelsius:1",
    "fahrenheit": "fahrenheit \\circf \\circfahrenheit:1",
    "force": "N newton:1",
    "energy": "J joule:1",
    "power": "W watt:1",
    "voltage": "V volt:1",
    "frequency": "Hz hertz:1",
}
PREFIX_NAMES = (
    "T tera:1e12 G giga:1e9 M mega:1e6 k kilo:1e3 d deci:1e-1 c centi:1e-2 m milli:1e-3 u micro:1e-6 n nano:1e-9"
)
PREFIXED = ("m", "g", "s", "l", "L", "J", "W", "V", "N", "Hz", "meter", "metre", "gram", "second", "liter", "litre")
PREFIXED += ("joule", "watt", "volt", "newton", "hertz")
SHORT_SPEEDS = {"mph": "mile per hour", "kph": "km per hour", "kmph": "km per hour", "kmh": "km per hour"}
SCALES = {"dozen": 12, "dozens": 12, "hundred": 10**2, "thousand": 10**3}
SCALES |= {"million": 10**6, "billion": 10**9, "trillion": 10**12}


def _sizes(names: str) -> dict[str, Fraction]:
    """The size of each name in a text such as "day:86400 h hr hour:3600"."""
    found = {}
    pending: list[str] = []
    for word in names.split():
        name, colon, size = word.partition(":")
        pending.append(name)
        if colon:
            found |= dict.fromkeys(pending, Fraction(size))
            pending = []
    return found


def _table() -> dict[str, tuple[str, int, Fraction]]:
    """Every known name: its kind, the exponent of the kind, and its size in the first unit of that kind."""
    found = {}
    for key, names in KINDS.items():
        kind, _, exponent = key.partition("^")
        found |= {name: (kind, int(exponent or 1), size) for name, size in _sizes(names).items()}
    for prefix, factor in _sizes(PREFIX_NAMES).items():
        for name in PREFIXED:
            if (len(prefix) > 1) == (len(name) > 2):  # kilometer and km, but neither kmeter nor kilom
                kind, power, size = found[name]
                found[prefix + name] = (kind, power, size * factor)
    return found


UNITS = _table()
