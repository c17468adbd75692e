r"""Separates what math-verify drops: an operator or a relation before an answer (`\ge 5`), and arrows in it."""

import re

# `\approx`, `\sim`, `\simeq` and `=` may stand before an answer; math-verify drops them.
BEFORE = re.compile(
    r"(?:\s|=(?!>)|\\(?:approx|sim|simeq|therefore)(?![A-Za-z]))*(?P<brace>\{\s*)?"
    r"(?P<sign>\\(?:le|ge|ne|neq|ll|gg|nless|ngtr|nleq|ngeq|not|times|div|cdot|ast|star|oplus|otimes|in|notin|ni|subset|"
    r"subseteq|supset|supseteq|cup|cap|setminus|mid|nmid|parallel|perp|propto|equiv|cong|prec|succ|neg|lnot|land|lor|"
    r"wedge|vee|circ|bullet|because)(?![A-Za-z])|[<>]=?|!=|[*/])\s*(?(brace)\}\s*)(?=\S)"
)
IN_PARENTHESES = re.compile(r"\(([^()]*)\)")
# An arrow, or the sign of an element before a number: math-verify keeps only what follows. A number has no elements.
ARROW = re.compile(
    r"\s*(\\(?:to|gets|mapsto|implies|iff|(?:[Ll]ong)?(?:[Rr]ight|[Ll]eft|[Ll]eftright)arrow|Long(?:left|right)arrow|"
    r"hookrightarrow|rightharpoonup|rightleftharpoons)(?![A-Za-z])|[-=]>|\\in(?= ?[-+]?[0-9.]+\Z))\s*"
)
SYNONYMS = {"\\ne": "\\neq", "!=": "\\neq", "<=": "\\le", ">=": "\\ge", "*": "\\times", "\\cdot": "\\times"}
SYNONYMS |= {"\\ast": "\\times", "/": "\\div"}
SYNONYMS |= dict.fromkeys(("\\rightarrow", "\\longrightarrow", "->"), "\\to")
SYNONYMS |= dict.fromkeys(("\\implies", "\\Longrightarrow", "=>"), "\\Rightarrow")


def split_operators(text: str) -> tuple[list[str], str]:
    """Returns the operators and relations before an answer in plain LaTeX, and the answer."""
    wrapped = IN_PARENTHESES.fullmatch(text)
    text = wrapped[1] if wrapped and BEFORE.match(wrapped[1]) else text
    operators, start = [], 0
    while found := BEFORE.match(text, start):
        operators.append(SYNONYMS.get(found["sign"], found["sign"]))
        start = found.end()
    return operators, text[start:]


def split_arrows(text: str) -> tuple[list[str], list[str]]:
    """Returns the arrows of an answer in plain LaTeX and the parts around them."""
    parts = ARROW.split(text)
    return [SYNONYMS.get(arrow, arrow) for arrow in parts[1::2]], parts[0::2]
