"""Tokens of source code in other languages than Python, by the lexers of pygments.

Only the lexers of the table are used: a response may name any language. Source of more than LONGEST_PIECE characters is
read in pieces, which end at line ends. So a lexer that takes quadratic time on a hostile text stays linear.
"""

import re
from collections.abc import Iterator
from functools import cache
from typing import Any

from megatron_paint.masker.code_tokens import CodeToken, number_value, string_value

LONGEST_PIECE = 5_000  # characters
PYTHON = frozenset(("python", "py", "python3", "py3", "python2", "pycon", "ipython", "sage"))
C_LIKE = "javascript"  # reads code without a language that is not Python: its strings and numbers are the most general
# Names that a fence may have -> pygments' name.
_OWN_NAMES = (
    "c cpp java javascript typescript go rust csharp kotlin swift scala ruby php bash sql r julia lua perl haskell"
)
_SHORT_NAMES = "c++=cpp cc=cpp h=cpp hpp=cpp js=javascript jsx=javascript node=javascript ts=typescript tsx=typescript"
_SHORT_NAMES += " golang=go rs=rust c#=csharp cs=csharp kt=kotlin rb=ruby sh=bash shell=bash zsh=bash jl=julia pl=perl"
LEXERS = {name: name for name in _OWN_NAMES.split()} | dict(pair.split("=") for pair in _SHORT_NAMES.split())
_C_LIKE_LINE = re.compile(r";[ \t]*$|\)[ \t]*\{[ \t]*$|^[ \t]*(?://|/\*|#include\b|<\?)", re.MULTILINE)
_WORD = re.compile(r"[^\W\d]\w*")
_GROUPS = re.compile(r"(?:_[0-9]+)+")
_QUOTES = ("'", '"', "`")


def language_of(source: str, named: str) -> str:
    """Returns `python` or pygments' name of the language.

    named: what the fence names. Without a known name it is Python, unless a line ends in `;` or `) {`, or begins with
    `//`, `/*`, `#include` or `<?`.
    """
    if named in PYTHON:
        return "python"
    return LEXERS.get(named) or (C_LIKE if _C_LIKE_LINE.search(source) else "python")


def lexer_tokens(source: str, language: str) -> list[CodeToken]:
    """Returns the tokens of a source without comments and directives. language: pygments' name of it."""
    lexer = _lexer(language)
    found: list[CodeToken] = []
    for at, piece in _pieces(source):
        for token in _tokens(lexer, piece, at):
            is_more = token.kind == "number" or _GROUPS.match(token.text)
            if found and found[-1].kind == "number" and found[-1].end == token.start and is_more:
                start = found.pop().start  # 1_000, which some lexers read as 1 and _000 or digit by digit
                token = CodeToken("number", number_value(source[start : token.end]), start, token.end)
            found.append(token)
    return found


@cache
def _lexer(language: str) -> Any:
    from pygments.lexers import get_lexer_by_name

    return get_lexer_by_name(language, **({"startinline": True} if language == "php" else {}))


def _pieces(source: str) -> Iterator[tuple[int, str]]:
    at = 0
    while at < len(source):
        end = len(source)
        if end - at > LONGEST_PIECE:
            end = source.rfind("\n", at, at + LONGEST_PIECE) + 1 or at + LONGEST_PIECE
        yield at, source[at:end]
        at = end


def _tokens(lexer: Any, piece: str, offset: int) -> Iterator[CodeToken]:
    from pygments.token import Comment, Keyword, Name, Number, Operator, Punctuation, String

    string: tuple[int, list[str]] | None = None  # where a string begins, and its parts
    for index, kind, text in lexer.get_tokens_unprocessed(piece):
        at = offset + index
        is_string = kind in String and kind not in String.Doc and kind not in String.Interpol
        if string is not None and not is_string:
            yield _string(*string)
            string = None
        if is_string:
            string = string or (at, [])
            string[1].append(text)
        elif kind in Comment or kind in String:  # documentation, and the signs around an expression in a string
            continue
        elif kind in Number:
            yield CodeToken("number", number_value(text), at, at + len(text))
        elif kind in Keyword or kind in Name.Builtin or kind in Operator.Word:
            yield CodeToken("keyword", text, at, at + len(text))
        elif kind in Name:
            for word in _WORD.finditer(text):
                yield CodeToken("name", word.group(), at + word.start(), at + word.end())
        elif kind in Operator or kind in Punctuation:
            yield CodeToken("operator", text, at, at + len(text))
        elif "\n" in text:
            yield CodeToken("newline", "", at, at + len(text))
    if string is not None:
        yield _string(*string)


def _string(start: int, parts: list[str]) -> CodeToken:
    text = "".join(parts)
    value = string_value(text)
    if not text.startswith(_QUOTES) and text.endswith(_QUOTES):  # the last part, after an expression
        value = value[:-1]
    return CodeToken("string", value, start, start + len(text))
