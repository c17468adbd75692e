"""Finds formulas as substrings of normalised text, by what touches them there."""

import re
from bisect import bisect_left
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate

_NUMBER_GOES_ON = re.compile(r"\.[0-9]|(?:,|\{,\})[0-9]{3}(?![0-9])")
# One `str.find` takes about 1 ns a character, one step of the automaton about 1 us (measured).
_FIND_IS_FASTER_BY = 1000


class Normal:
    """Text without white space, math delimiters and spacing commands, which knows where they stood."""

    def __init__(self, pieces: list[str]):
        self.text = "".join(pieces)
        self._pieces = pieces

    @cached_property
    def _gaps(self) -> list[int]:
        return list(accumulate(map(len, self._pieces)))

    def is_gap(self, at: int) -> bool:
        """Whether the characters before and at a position did not touch in the original text."""
        index = bisect_left(self._gaps, at)
        return index < len(self._gaps) and self._gaps[index] == at


def standing_in(normal: Normal, passages: Sequence[str]) -> set[str]:
    """Those of the passages, none empty, that occur with no letter or digit touching them on either side.

    Where a passage begins or ends in a digit, a decimal point or thousands separator there counts as more digits:
    x=1 is not in x=1.5. Linear in the lengths of the text and of the passages, and in the number of occurrences.
    """
    length = len(normal.text)
    if len(passages) * length <= _FIND_IS_FASTER_BY * (length + sum(map(len, passages))):
        return {passage for passage in passages if _stands_in(normal, passage)}
    return _standing_in_long(normal, passages)


def _stands_in(normal: Normal, passage: str) -> bool:
    start = normal.text.find(passage)
    while start >= 0:
        if _is_free(normal, start, start + len(passage)):
            return True
        start = normal.text.find(passage, start + 1)
    return False


def _standing_in_long(normal: Normal, passages: Sequence[str]) -> set[str]:
    """The same by one pass over the text with an Aho-Corasick automaton over all passages."""
    children: list[dict[str, int]] = [{}]
    ends: list[str] = [""]
    for passage in passages:
        node = 0
        for letter in passage:
            child = children[node].get(letter)
            if child is None:
                child = children[node][letter] = len(children)
                children.append({})
                ends.append("")
            node = child
        ends[node] = passage

    fallback = [0] * len(children)  # the longest proper suffix that is a node
    shorter = [0] * len(children)  # the longest proper suffix that is a passage
    level = list(children[0].values())
    while level:
        deeper = []
        for node in level:
            for letter, child in children[node].items():
                suffix = _step(children, fallback, fallback[node], letter)
                fallback[child] = suffix
                shorter[child] = suffix if ends[suffix] else shorter[suffix]
                deeper.append(child)
        level = deeper

    found: set[str] = set()
    node = 0
    for end, letter in enumerate(normal.text, start=1):
        node = _step(children, fallback, node, letter)
        match = node if ends[node] else shorter[node]
        while match:
            passage = ends[match]
            if passage not in found and _is_free(normal, end - len(passage), end):
                found.add(passage)
            match = shorter[match]
    return found


def _step(children: list[dict[str, int]], fallback: list[int], node: int, letter: str) -> int:
    while node and letter not in children[node]:
        node = fallback[node]
    return children[node].get(letter, 0)


def _is_free(normal: Normal, start: int, end: int) -> bool:
    return _is_free_before(normal, start) and _is_free_after(normal, end)


def _is_free_before(normal: Normal, start: int) -> bool:
    text = normal.text
    if start == 0:
        return True
    before = text[start - 1]
    if before.isalnum():
        return normal.is_gap(start)
    if before != "." or not text[start].isdigit() or not text[max(0, start - 2)].isdigit():
        return True
    return normal.is_gap(start) or normal.is_gap(start - 1)


def _is_free_after(normal: Normal, end: int) -> bool:
    text = normal.text
    if end == len(text):
        return True
    if text[end].isalnum():
        return normal.is_gap(end)
    if not text[end - 1].isdigit() or not _NUMBER_GOES_ON.match(text, end):
        return True
    return normal.is_gap(end) or normal.is_gap(end + 1)
