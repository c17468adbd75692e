r"""Translates Unicode mathematics to LaTeX: `√2` to `\sqrt{2}`, `½` to `\frac{1}{2}`, `x²` to `x^{2}`, `１２` to `12`.

math-verify reads LaTeX and ASCII only. The time is linear in the text's length.
"""

import re
import unicodedata

LONGEST = 20_000  # characters
MOST_GROWTH = 3  # from compatibility forms to plain characters; a ligature of 18 letters is no mathematics

SIGNS = {
    "×": r"\times ",
    "✕": r"\times ",
    "÷": r"\div ",
    "·": r"\cdot ",
    "⋅": r"\cdot ",
    "∙": r"\cdot ",
    "∗": "*",
    "±": r"\pm ",
    "∓": r"\mp ",
    "≤": r"\le ",
    "≦": r"\le ",
    "⩽": r"\le ",
    "≥": r"\ge ",
    "≧": r"\ge ",
    "⩾": r"\ge ",
    "≠": r"\neq ",
    "≈": r"\approx ",
    "≅": r"\cong ",
    "≡": r"\equiv ",
    "∞": r"\infty ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∖": r"\setminus ",
    "∈": r"\in ",
    "∉": r"\notin ",
    "⊂": r"\subset ",
    "⊆": r"\subseteq ",
    "∅": r"\emptyset ",
    "⌀": r"\emptyset ",
    "ℝ": r"\mathbb{R}",
    "ℤ": r"\mathbb{Z}",
    "ℕ": r"\mathbb{N}",
    "ℚ": r"\mathbb{Q}",
    "ℂ": r"\mathbb{C}",
    "…": r"\ldots ",
    "⋯": r"\ldots ",
    "→": r"\to ",
    "∠": r"\angle ",
    "⌊": r"\lfloor ",
    "⌋": r"\rfloor ",
    "⌈": r"\lceil ",
    "⌉": r"\rceil ",
    "⟨": r"\langle ",
    "⟩": r"\rangle ",
    "∑": r"\sum ",
    "∫": r"\int ",
    "°": r"^\circ ",
    "º": r"^\circ ",
    "˚": r"^\circ ",
    "℃": r"^\circ C",
    "℉": r"^\circ F",
    "−": "-",
    "‐": "-",
    "‑": "-",
    "‒": "-",
    "–": "-",
    "﹣": "-",
    "⁄": "/",
    "∕": "/",
    "∶": ":",
    "、": ",",
    "。": ".",
    "′": "'",
    "’": "'",
    "‘": "'",
    "“": '"',
    "”": '"',
    "\N{NO-BREAK SPACE}": "~",
    "\N{THIN SPACE}": r"\,",
    "\N{NARROW NO-BREAK SPACE}": r"\,",
}
GREEK_LETTERS = "αβγδεζηθικλμνξπρστυφχψωΓΔΘΛΞΠΣΦΨΩ"
VARIANTS = {"ϕ": "phi", "ϵ": "epsilon", "ϑ": "theta", "λ": "lambda", "Λ": "Lambda"}  # Unicode's names differ
# Zero-width characters and the invisible operators of mathematics carry nothing that can be read.
INVISIBLE = dict.fromkeys(
    map(ord, "\u200b\u200c\u200d\u200e\u200f\u2060\u2061\u2062\u2063\u2064\ufeff\ufe0e\ufe0f"), ""
)


def _greek_name(letter: str) -> str:
    name = unicodedata.name(letter).split()[-1].lower()
    return name.capitalize() if letter.isupper() else name


TABLE = {
    **INVISIBLE,
    **{ord(sign): latex for sign, latex in SIGNS.items()},
    **{ord(letter): f"\\{_greek_name(letter)} " for letter in GREEK_LETTERS},
    **{ord(letter): f"\\{name} " for letter, name in VARIANTS.items()},
}

SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ", "0123456789+-()ni", strict=True))
SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋₍₎ₙₖ", "0123456789+-()nk", strict=True))
RAISED = re.compile(f"[{''.join(SUPERSCRIPTS)}]+")
LOWERED = re.compile(f"[{''.join(SUBSCRIPTS)}]+")
VULGAR = re.compile("[¼½¾⅐-⅞↉]")
ROOT = re.compile(r"([√∛∜])\s*(?:\{([^{}]*)\}|\(([^()]*)\)|([0-9]+(?:\.[0-9]+)?|[A-Za-z]|\\[a-z]+ ?)|(?=\())")
ROOT_COMMANDS = {"√": r"\sqrt", "∛": r"\sqrt[3]", "∜": r"\sqrt[4]"}
BARRED = re.compile("(?:[0-9][\u0305\u0304])+")  # digits under a bar, as in 0.3̅
DOTTED = re.compile("([0-9])\u0307")  # a digit under a dot, as in 0.3̇


def to_latex(text: str) -> str:
    """Returns the text with mathematical signs as LaTeX and with ASCII digits, letters and punctuation.

    Compatibility forms (full width, bold, italic) become plain characters. Other letters, as of Chinese, are kept.
    A longer text than any answer is returned as it is.
    """
    if text.isascii() or len(text) > LONGEST:
        return text
    text = RAISED.sub(lambda match: "^{" + "".join(map(SUPERSCRIPTS.__getitem__, match[0])) + "}", text)
    text = LOWERED.sub(lambda match: "_{" + "".join(map(SUBSCRIPTS.__getitem__, match[0])) + "}", text)
    text = VULGAR.sub(_vulgar_fraction, text).translate(TABLE)
    plain = unicodedata.normalize("NFKC", text)
    if len(plain) <= MOST_GROWTH * len(text):
        text = plain.translate(TABLE)  # bold Greek has become Greek, which is in the table
    text = text.translate({ord(sign): _ascii_digit(sign) for sign in set(text) if not sign.isascii()})
    text = BARRED.sub(lambda match: r"\overline{" + match[0].translate({0x304: "", 0x305: ""}) + "}", text)
    text = DOTTED.sub(r"\\dot{\1}", text)
    return ROOT.sub(_root, text)


def _vulgar_fraction(match: re.Match[str]) -> str:
    top, bottom = unicodedata.normalize("NFKC", match[0]).split("\N{FRACTION SLASH}")
    return rf"\frac{{{top}}}{{{bottom}}}"


def _ascii_digit(character: str) -> str:
    value = unicodedata.decimal(character, -1)
    return character if value < 0 else str(value)


def _root(match: re.Match[str]) -> str:
    command = ROOT_COMMANDS[match[1]]
    content = next((group for group in match.groups()[1:] if group is not None), None)
    return command if content is None else f"{command}{{{content.strip()}}}"
