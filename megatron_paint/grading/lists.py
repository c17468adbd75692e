"""Splits lists into their elements, and pairs the values of named variables with those of a plain list."""

import re

SPLIT = re.compile(r"\s*(?:[,;]|\\text\{\s*(?:,\s*)?(?:and|or)\s*\}|(?<![A-Za-z])(?:and|or)(?![A-Za-z]))\s*")
BRACKETS = {"(": ")", "[": "]", "{": "}"}
NAMED = re.compile(r"([A-Za-z](?:_\{?[0-9A-Za-z]+\}?)?(?:\([A-Za-z]\))?)\s*=\s*([^=]+)")


def split_list(text: str) -> tuple[str, list[str]]:
    r"""Returns the brackets around a list ("" for none, "{" for `\{...\}`, "(]" for an interval) and its elements."""
    text, opened = text.strip(), ""
    inner = text[2:-2] if text.startswith("\\{") and text.endswith("\\}") else text[1:-1]
    if len(text) > 2 and text[0] in "([\\" and text[-1] in ")]}" and _is_balanced(inner):
        opened = "{" if text[0] == "\\" else text[0] + text[-1]
        text = inner
    pieces, level, start = [], 0, 0
    for match in re.finditer(rf"[(\[{{]|[)\]}}]|{SPLIT.pattern}", text):
        if match[0] in BRACKETS:
            level += 1
        elif match[0] in BRACKETS.values():
            level -= 1
        elif level == 0:
            pieces.append(text[start : match.start()])
            start = match.end()
    pieces.append(text[start:])
    return opened, [piece.strip() for piece in pieces if piece.strip()]


def _is_balanced(text: str) -> bool:
    level = 0
    for character in text:
        level += (character in BRACKETS) - (character in BRACKETS.values())
        if level < 0:
            return False
    return level == 0


def ordered_values(gold: str, given: str) -> tuple[list[str], list[str]] | None:
    """Returns the values of both lists in one order if only one list names its values, as `x=1, y=2` does.

    None: they are no such lists. Indexed names of one letter, as x_1 and x_2, may be the solutions of one equation;
    they set no order. Neither does a name in the response if the gold answer is a list without names and brackets.
    """
    names, others = _named_values(gold), _named_values(given)
    if (names is None) == (others is None):
        return None
    opened, plain = split_list(given if names is not None else gold)
    if len(plain) < 2 or any("=" in value for value in plain):
        return None
    if names is None:
        return (plain, others) if opened and opened != "{" and others is not None else None
    return names, plain


def _named_values(text: str) -> list[str] | None:
    """The values of a list that names each value with another letter."""
    opened, elements = split_list(text)
    matches = [NAMED.fullmatch(element) for element in elements]
    found = [match for match in matches if match is not None]
    if opened not in ("", "()") or len(found) < max(len(matches), 2):
        return None
    letters = {match[1].split("_")[0] for match in found}
    return [match[2] for match in found] if len(letters) == len(found) else None
