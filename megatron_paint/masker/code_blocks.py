"""Finds code in a text: fenced blocks, inline code, or the complete text. The time is linear, and any text is safe."""

import re
from typing import NamedTuple

_FENCE = re.compile(r"^[ \t]*(?P<mark>`{3,}|~{3,})(?P<info>[^\n]*)$", re.MULTILINE)
_INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_LANGUAGE = re.compile(r"[\w+#-]+")


class CodeBlock(NamedTuple):
    """A piece of code of a text: text[start:end]."""

    start: int
    end: int
    language: str  # what its fence names, in small letters; empty: nothing


def fenced_blocks(text: str) -> list[CodeBlock]:
    """Returns the blocks between fences of three or more ` or ~, in order. An unclosed block runs to the text's end."""
    found = []
    opened: tuple[str, CodeBlock] | None = None  # its fence, and the block with an open end
    for match in _FENCE.finditer(text):
        mark, info = match["mark"], match["info"].strip()
        if opened is None:
            if mark[0] not in info:
                language = _LANGUAGE.match(info)
                name = language.group().lower() if language else ""
                opened = mark, CodeBlock(min(match.end() + 1, len(text)), len(text), name)
        elif mark[0] == opened[0][0] and len(mark) >= len(opened[0]) and not info:
            found.append(opened[1]._replace(end=max(opened[1].start, match.start())))
            opened = None
    return found if opened is None else [*found, opened[1]]


def code_blocks(text: str) -> list[CodeBlock]:
    """Returns the code of a text: its fenced blocks and inline code. A text without a fence is code as a whole.

    Inline code has the language of the first fenced block.
    """
    fenced = fenced_blocks(text)
    if not fenced:
        return [CodeBlock(0, len(text), "")]
    prose = without_code(text, fenced)
    inline = [CodeBlock(match.start(1), match.end(1), fenced[0].language) for match in _INLINE.finditer(prose)]
    return sorted([*fenced, *inline])


def without_code(text: str, blocks: list[CodeBlock]) -> str:
    """Returns the text, of the same length, with line ends in place of the blocks. So no formula reaches over one."""
    pieces, at = [], 0
    for block in blocks:
        pieces += [text[at : block.start], "\n" * (block.end - block.start)]
        at = block.end
    return "".join([*pieces, text[at:]])
