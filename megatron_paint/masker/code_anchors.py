"""Anchors of a solution that is a program: names, literals, calls and returned expressions; boxed answers too.

All rules are ours. Python is read by its own tokenizer, other languages by pygments. The functions take plain text and
return plain values. Their time is linear in the text length. They never raise, on any text.
"""

import re
from collections.abc import Iterable, Iterator

from megatron_paint.masker.anchors import TRIVIAL_NUMBERS, ExtractedAnchor, extract_boxes, find_math
from megatron_paint.masker.code_blocks import CodeBlock, code_blocks, fenced_blocks, without_code
from megatron_paint.masker.code_tokens import CodeToken, number_value
from megatron_paint.masker.cut import Parts, math_parts, merged
from megatron_paint.masker.latex import Span, blank, boxes
from megatron_paint.masker.lexer_tokens import language_of, lexer_tokens
from megatron_paint.masker.python_tokens import python_tokens
from megatron_paint.masker.substring import NormalisedText, find_substrings

SHORTEST_NAME = 2  # characters
SHORTEST_STRING = 2  # characters that are no white space
MOST_RETURNED = 200  # tokens of a returned expression
# Names and calls that almost every program has.
TRIVIAL_NAMES = frozenset(("self", "cls", "this", "__name__", "__init__", "main", "std"))
_COMMON_CALLS = (
    "print printf main len range int str float list dict set tuple bool input super enumerate zip min max sum"
)
TRIVIAL_CALLS = frozenset(_COMMON_CALLS.split())
_DEFINES = frozenset(("def", "class", "function", "fn", "func", "fun", "struct", "interface"))
_WORD = re.compile(r"[^\W\d]\w*")
_NUMBER = re.compile(r"[0-9][0-9A-Za-z_]*(?:\.[0-9][0-9A-Za-z_]*)?")
_OPENED, _CLOSED = "([{", ")]}"


def extract_code(problem: str, solution: str) -> tuple[ExtractedAnchor, ...]:
    """Returns the anchors of a solution: boxes, returned expressions, calls, literals and names, each kind in order.

    Nothing counts that the problem has too. Anchors with the same text appear once.
    """
    found: dict[str, dict[str, None]] = {kind: {} for kind in ("return", "call", "literal", "name")}
    for kind, text in _pieces(solution):
        found[kind].setdefault(text)
    words = {match.group() for match in _WORD.finditer(problem)}
    numbers = TRIVIAL_NUMBERS | {number_value(match.group()) for match in _NUMBER.finditer(problem)}
    passages = {text: _squeezed(text) for kind in ("return", "literal") for text in found[kind]}
    given = find_substrings(
        NormalisedText(problem.split()), list({passage for passage in passages.values() if passage})
    )
    extracted = {anchor.text: anchor for anchor in extract_boxes(solution)}
    for kind, texts in found.items():
        for text in texts:
            known = (
                text.removesuffix("()") in words
                if kind in ("call", "name")
                else text in numbers or passages[text] in given
            )
            if not known:
                extracted.setdefault(text, ExtractedAnchor(kind, text, False))
    return tuple(extracted.values())


def find_code(anchors: tuple[ExtractedAnchor, ...], rollout: str) -> tuple[bool, ...]:
    """Tells for each anchor whether the rollout contains it: a box as in mathematics, all others in its code."""
    pieces = {text for _, text in _pieces(rollout)} if anchors else set()
    boxed = tuple(anchor for anchor in anchors if anchor.kind == "boxed")
    found = dict(zip(boxed, find_math(boxed, rollout), strict=True)) if boxed else {}
    return tuple(found[anchor] if anchor.kind == "boxed" else anchor.text in pieces for anchor in anchors)


def code_parts(solution: str) -> Parts:
    """Returns the statements of the code, and the formulas and boxes of the prose around it.

    A statement of Python may have several lines. In other languages every line is one.
    """
    fenced = fenced_blocks(solution)
    blocks = fenced or [CodeBlock(0, len(solution), "")]
    statements = [span for block in blocks for span in _statements(solution, block)]
    prose = without_code(solution, blocks)
    return Parts(math_parts(prose).formulas, merged(statements))


def _pieces(text: str) -> Iterator[tuple[str, str]]:
    """Yields (kind, text) of everything in the code of a text that may be an anchor."""
    text = blank(text, [(box.start, box.end) for box in boxes(text)])
    for block in code_blocks(text):
        yield from _pieces_of(_tokens(text[block.start : block.end], block.language))


def _tokens(source: str, named: str) -> list[CodeToken]:
    language = language_of(source, named)
    return python_tokens(source) if language == "python" else lexer_tokens(source, language)


def _pieces_of(tokens: list[CodeToken]) -> Iterator[tuple[str, str]]:
    for index, token in enumerate(tokens):
        if token.kind == "name":
            yield from _of_name(tokens, index)
        elif token.kind == "number":
            if token.text not in TRIVIAL_NUMBERS:
                yield "literal", token.text
        elif token.kind == "string":
            if len("".join(token.text.split())) >= SHORTEST_STRING:
                yield "literal", _quoted(token.text)
        elif token.kind == "keyword" and token.text == "return":
            expression = _returned(tokens, index + 1)
            if len(expression) > 1:
                yield "return", f"return {_joined(expression)}"


def _of_name(tokens: list[CodeToken], index: int) -> Iterator[tuple[str, str]]:
    name = tokens[index].text
    follows = tokens[index + 1] if index + 1 < len(tokens) else None
    is_followed = follows is not None and follows.kind == "operator" and follows.text.startswith("(")
    is_call = is_followed and not (index and tokens[index - 1].text in _DEFINES)
    if is_call and name not in TRIVIAL_CALLS:
        yield "call", f"{name}()"
    elif not is_call and len(name) >= SHORTEST_NAME and name not in TRIVIAL_NAMES | TRIVIAL_CALLS:
        yield "name", name


def _returned(tokens: list[CodeToken], first: int) -> list[CodeToken]:
    """Returns the tokens of an expression: up to the end of the statement, outside brackets, or the next `return`."""
    found: list[CodeToken] = []
    depth = 0  # of open brackets
    for token in tokens[first : first + MOST_RETURNED]:
        if token.kind == "keyword" and token.text == "return":
            break
        if token.kind == "newline":
            if depth == 0 and not _continues(found):
                break
        elif token.kind == "operator":
            kept, depth = _inside(token.text, depth)
            if kept:
                found.append(token._replace(text=kept))
            if kept != token.text:
                break
        else:
            found.append(token)
    return found


def _continues(expression: list[CodeToken]) -> bool:
    """Tells whether an expression continues in the next line, because it ends in an operator."""
    return bool(expression) and expression[-1].kind == "operator" and expression[-1].text[-1] not in _CLOSED


def _inside(signs: str, depth: int) -> tuple[str, int]:
    """Returns the signs that belong to an expression, and its open brackets then. A lexer may join signs: `);`."""
    for index, sign in enumerate(signs):
        if depth == 0 and (sign in _CLOSED or sign == ";"):
            return signs[:index], depth
        depth += (sign in _OPENED) - (sign in _CLOSED)
    return signs, depth


def _joined(tokens: Iterable[CodeToken]) -> str:
    """Returns the tokens as one text, with a space only between two words."""
    parts: list[str] = []
    for token in tokens:
        text = _quoted(token.text) if token.kind == "string" else token.text
        if parts and parts[-1][-1:].isalnum() and text[:1].isalnum():
            parts.append(" ")
        parts.append(text)
    return "".join(parts)


def _quoted(text: str) -> str:
    return f"'{text}'"


def _squeezed(anchor: str) -> str:
    """Returns what a problem would contain of a literal or a returned expression, without white space."""
    text = anchor.removeprefix("return ")
    text = text[1:-1] if text.startswith("'") and text.endswith("'") and len(text) > 1 else text
    return "".join(text.split())


def _statements(solution: str, block: CodeBlock) -> Iterator[Span]:
    """Yields each line of a block, and the statements of Python that have several lines. Spans may overlap."""
    source = solution[block.start : block.end]
    at = block.start
    for line in source.split("\n"):
        if line.strip():
            yield Span(at, at, at + len(line), at + len(line))
        at += len(line) + 1
    if language_of(source, block.language) != "python":
        return
    first: int | None = None
    for token in python_tokens(source, docstrings=True):
        if token.kind == "newline":
            if first is not None and "\n" in source[first : token.start]:
                start, end = block.start + first, block.start + token.start
                yield Span(start, start, end, end)
            first = None
        elif first is None:
            first = token.start
