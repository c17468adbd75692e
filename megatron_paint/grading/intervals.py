r"""Reads inequalities with "or" as unions of intervals: `x<1\text{ or }x>3` as `(-\infty,1)\cup(3,\infty)`."""

import re

OR = re.compile(r"\s*\\text\{\s*,?\s*or\s*\}\s*")
VALUE = r"((?:(?!\\[lg]e(?![A-Za-z])|\\text)[^<>=,])+?)"
ONE_SIDE = re.compile(rf"([A-Za-z])\s*(<|>|\\le|\\ge)\s*{VALUE}")
TWO_SIDES = re.compile(rf"{VALUE}\s*(<|\\le)\s*([A-Za-z])\s*(<|\\le)\s*{VALUE}")
MOST_PARTS = 10


def alike(gold: str, given: str) -> tuple[str, str]:
    r"""Returns two answers in plain LaTeX, with the union in place of inequalities if only the other one is a union."""
    if r"\cup" in given:
        return union(gold) or gold, given
    return gold, (union(given) or given) if r"\cup" in gold else given


def union(text: str) -> str | None:
    """Returns the union of intervals that two or more inequalities of one variable describe, or None."""
    parts = OR.split(text)
    if not 2 <= len(parts) <= MOST_PARTS:
        return None
    found = [_interval(part.strip()) for part in parts]
    if None in found or len({variable for variable, _ in found}) != 1:
        return None
    return r"\cup".join(interval for _, interval in found)


def _interval(text: str) -> tuple[str, str] | None:
    """(variable, interval) of one inequality."""
    if match := TWO_SIDES.fullmatch(text):
        low, opened, variable, closed, high = match.groups()
        return variable, f"{'(' if opened == '<' else '['}{low},{high}{')' if closed == '<' else ']'}"
    match = ONE_SIDE.fullmatch(text)
    if match is None:
        return None
    variable, sign, value = match.groups()
    if sign in ("<", r"\le"):
        return variable, rf"(-\infty,{value}{')' if sign == '<' else ']'}"
    return variable, rf"{'(' if sign == '>' else '['}{value},\infty)"
