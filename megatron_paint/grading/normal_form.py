r"""Writes answers in one form: `normal_form` for the comparison of texts, `plain_latex` for a reader of mathematics."""

import re

from megatron_paint.grading.repeating_decimals import repeating_as_fractions
from megatron_paint.grading.unicode_math import to_latex

SEPARATOR = r"(?:(?<!\\)\\[,;: ]|~|\{,\}|,?\\! ?)"
THOUSANDS = re.compile(rf"(?<![0-9.,])([0-9]{{1,3}}(?:{SEPARATOR}[0-9]{{3}})+)(?![0-9])")
SEPARATOR_SIGNS = re.compile(SEPARATOR)
SPACED_NUMBER = re.compile(r"(\s*[-+]?(?:\\\$)?\s*)([0-9]{1,3}(?: [0-9]{3})+)(?![0-9])((?:\.[0-9]+)?[^0-9]*)")
# One start for each run of digits and apostrophes; a start at each group would make the time quadratic.
APOSTROPHES = re.compile(r"(?<![0-9'])([-+]?[0-9]{1,3}(?:'[0-9]{3})+)(?=\.?[0-9]*$)")

NEGATIVE_SPACE = re.compile(r"(?<!\\)\\!")
WIDE_SPACE = re.compile(r"(?<!\\)\\(?:[,;: ~]|q?quad(?![A-Za-z])|thinspace(?![A-Za-z]))|~")
DECORATION = re.compile(r"\\(?:left|right|mleft|mright|[bB]igg?[lr]?|displaystyle|textstyle|limits)(?![A-Za-z])")
DOLLARS = re.compile(r"\\\$|\$")
DOLLAR = re.compile(r"(?<!\\)\$")
DELIMITER = re.compile(r"(?<!\\)\\[()\[\]]")
TEXT_NAMES = (
    "text|textbf|textit|textrm|textsf|texttt|textnormal|mathrm|mathbf|mathit|mathsf|mathtt|mbox|hbox|operatorname|"
    "boldsymbol|bm|emph"
)
TEXT_COMMAND = re.compile(rf"\\(?:{TEXT_NAMES})\s*\{{([^{{}}]*)\}}")
OLD_TEXT = re.compile(r"\{\s*\\(?:rm|bf|it)(?![A-Za-z])\s*([^{}]*)\}")
PLAIN_TEXT = re.compile(r"\\text\{([^{}]*)\}")
FRACTION = re.compile(r"\\[dtc]frac(?![A-Za-z])")
SHORT_FRACTION = re.compile(r"\\frac\s*(\{[^{}]*\}|[0-9])\s*(\{[^{}]*\}|[0-9])")
LOOSE_SPACE = re.compile(r"(?<![0-9A-Za-z]) | (?![0-9A-Za-z])")  # of single spaces
IN_PARENTHESES = re.compile(r"\(([0-9]+|[A-Za-z])\)")
DEGREES = re.compile(r" ?(?:\^\s*\{?\s*\\circ(?![A-Za-z])\s*\}?|\\degree(?![A-Za-z]))")
PERCENT = re.compile(
    r" ?(?:\\?%|\\text\{\s*(?:percent(?:age)?|per cent|pct|\\?%)\.?\s*\}|\b(?:percent(?:age)?|per cent)\b)"
)
SYNONYMS = (
    (re.compile(r"\\(?:varnothing(?![A-Za-z])|\{\s*\\\})"), r"\\emptyset "),
    (re.compile(r"\\(?:leqslant|leq|le)(?![A-Za-z])"), r"\\le "),
    (re.compile(r"\\(?:geqslant|geq|ge)(?![A-Za-z])"), r"\\ge "),
    (re.compile(r"\\lt(?![A-Za-z])"), "<"),
    (re.compile(r"\\gt(?![A-Za-z])"), ">"),
    (re.compile(r"\\(?:ldots|cdots|dots[cbmi]?)(?![A-Za-z])|(?<!\.)\.\.\.(?!\.)"), r"\\ldots "),
    (re.compile(r"\\colon(?![A-Za-z])|\{:\}"), ":"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\text\{\s*([ei])\s*\}"), r"\1"),  # upright constants
    (re.compile(r"(?<![A-Za-z\\])pi(?![A-Za-z])"), r"\\pi "),
)
ANGLE = r"([0-9]+(?:\.[0-9]+)?)\s*\^\\circ"
TRIGONOMETRIC = re.compile(
    r"(\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])\s*(?:\^\s*\{?[0-9]\}?)?)\s*"
    rf"(?:\(\s*{ANGLE}\s*\)|\{{\s*{ANGLE}\s*\}}|{ANGLE})"
)


def join_thousands(text: str) -> str:
    r"""Removes separators before groups of three digits: `12\,345`, `12~345`, `12{,}345` and the complete `12 345`.

    A plain comma is kept, because `1,234` may also be a list.
    """
    if not any(mark in text for mark in ("\\", "~", "{,}", " ", "'")):
        return text
    text = THOUSANDS.sub(lambda match: SEPARATOR_SIGNS.sub("", match[0]), text)
    if alone := SPACED_NUMBER.fullmatch(text):
        return alone[1] + alone[2].replace(" ", "") + alone[3]
    return APOSTROPHES.sub(lambda match: match[0].replace("'", ""), text) if "'" in text else text


def normal_form(text: str) -> str:
    """Returns the text without spacing, sizes, dollar signs, text commands and final full stop.

    Answers with equal forms are equal. A space between letters or digits is kept, because "1 2" is not 12. Parentheses
    around a single number or letter are removed. Unicode signs become LaTeX.
    """
    text = join_thousands(to_latex(text.strip()))
    text = WIDE_SPACE.sub(" ", NEGATIVE_SPACE.sub("", text))
    text = TEXT_COMMAND.sub(r" \1 ", DOLLARS.sub("", DECORATION.sub("", text)))
    text = DEGREES.sub(r"^\\circ ", FRACTION.sub(r"\\frac", " ".join(text.split())))
    text = LOOSE_SPACE.sub("", " ".join(text.split())).rstrip(".")
    alone = IN_PARENTHESES.fullmatch(text)
    return alone[1] if alone else text


def same_text(a: str, b: str) -> bool:
    """Tells whether two answers have the same normal form. The case of letters matters in formulas, not in words."""
    a, b = normal_form(a), normal_form(b)
    return bool(a) and (a == b or (len(a) > 1 and a.isalpha() and a.casefold() == b.casefold()))


def plain_latex(text: str) -> str:
    r"""Returns an answer with one way to write each thing that can be written in several.

    Thousands are joined. Text commands are `\text{}`; they are removed from a number. Spacing is a single space.
    Repeating decimals are fractions. `^\circ`, `\%`, `\le`, `\ldots` and `\emptyset` replace their synonyms. A `\$` is
    kept, because it is a unit. Angles of trigonometric functions are in radians.
    """
    text = join_thousands(to_latex(text.strip()))
    if text.startswith("**") and text.endswith("**"):  # bold in Markdown
        text = text.strip("*")
    text = DELIMITER.sub("", DOLLAR.sub(" ", DECORATION.sub("", text)))
    text = _unify_text_commands(text)
    text = " ".join(WIDE_SPACE.sub(" ", NEGATIVE_SPACE.sub("", text)).split())
    text = SHORT_FRACTION.sub(_braced_fraction, FRACTION.sub(r"\\frac", text))
    text = PERCENT.sub(r"\\%", DEGREES.sub(r"^\\circ ", text))
    for pattern, replacement in SYNONYMS:
        text = pattern.sub(replacement, text)
    text = repeating_as_fractions(join_thousands(text))
    text = TRIGONOMETRIC.sub(_in_radians, text)
    return " ".join(text.split()).rstrip(" .,;")


def without_text_commands(text: str) -> str:
    """Returns plain LaTeX with the words in place of their text commands."""
    return " ".join(PLAIN_TEXT.sub(r" \1 ", text).split())


def _unify_text_commands(text: str) -> str:
    r"""Writes every text command as `\text{}`. One around digits, as in `\textbf{12}` or `\text{12 cm}`, is removed."""
    text = OLD_TEXT.sub(r"\\text{\1}", text)
    for _ in range(3):  # commands inside commands
        new = TEXT_COMMAND.sub(_text, text)
        if new == text:
            break
        text = new
    return text


def _text(match: re.Match[str]) -> str:
    content = match[1]
    return f" {content} " if any(map(str.isdigit, content)) else rf"\text{{{content}}}"


def _braced_fraction(match: re.Match[str]) -> str:
    top, bottom = (part if part[0] == "{" else "{" + part + "}" for part in match.groups())
    return rf"\frac{top}{bottom}"


def _in_radians(match: re.Match[str]) -> str:
    return rf"{match[1]}(\frac{{{match[2] or match[3] or match[4]}\pi}}{{180}})"
