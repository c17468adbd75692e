"""Tokens of Python source by Python's own tokenizer, also of source that is unfinished or broken.

Indentation does not count. A character that the tokenizer refuses is left out. What follows a triple quotation mark
that is never closed is read as code. So the result is a function of the text, with small differences between versions
of Python in broken code. The time is linear, because lines have a bounded length.
"""

import io
import keyword
import tokenize
from collections.abc import Iterator

from megatron_paint.masker.code_tokens import CodeToken, number_value, string_value, unescaped

LONGEST_LINE = 1000  # characters; a longer line is divided, because a line of broken strings takes quadratic time
TRIPLE_QUOTES = ('"""', "'''")
_SPACES = {ord("\r"): " ", 0: " "}  # the tokenizer of Python 3.12 may fail on them
_FORMATTED_STARTS = ("FSTRING_START", "TSTRING_START")  # of Python 3.12 and 3.14
_FORMATTED_TEXTS = ("FSTRING_MIDDLE", "TSTRING_MIDDLE")
_FORMATTED_ENDS = ("FSTRING_END", "TSTRING_END")


def python_tokens(source: str, *, docstrings: bool = False) -> list[CodeToken]:
    """Returns the tokens of a source without comments, in order.

    A formatted string becomes its texts and the tokens of its expressions. docstrings: with strings that are statements
    of their own.
    """
    tokens = _all_tokens(source)
    return list(tokens if docstrings else _without_docstrings(tokens))


def _all_tokens(source: str) -> Iterator[CodeToken]:
    lines = _lines(source.encode("utf-8", "replace").decode("utf-8"))
    row = 0
    while row < len(lines):
        try:
            yield from _tokens_from(lines, row)
            return
        except (tokenize.TokenError, SyntaxError) as error:
            row = _next_row(lines, row, error)


def _lines(source: str) -> list[tuple[int, str]]:
    """Returns each line without its indentation, and where it begins. Every line ends in a line end."""
    found, at = [], 0
    for line in source.split("\n"):
        for begin in range(0, max(len(line), 1), LONGEST_LINE):
            piece = line[begin : begin + LONGEST_LINE]
            text = piece.lstrip(" \t\f\r")
            found.append((at + begin + len(piece) - len(text), text.translate(_SPACES) + "\n"))
        at += len(line) + 1
    return found


def _tokens_from(lines: list[tuple[int, str]], first: int) -> Iterator[CodeToken]:
    rows = iter(range(first, len(lines)))

    def read_line() -> str:
        row = next(rows, None)
        return "" if row is None else lines[row][1]

    fields: list[int] = []  # of each open formatted string: its open braces
    texts: list[CodeToken] = []  # of a formatted string, up to its next field
    for token in tokenize.generate_tokens(read_line):
        name = tokenize.tok_name[token.type]
        start, end = (
            lines[min(first + row - 1, len(lines) - 1)][0] + column for row, column in (token.start, token.end)
        )
        if name in _FORMATTED_TEXTS:
            if fields and not fields[-1]:  # else it is the format of a field
                texts.append(CodeToken("string", unescaped(token.string), start, end))
            continue
        if texts:
            yield texts[0]._replace(text="".join(part.text for part in texts), end=texts[-1].end)
            texts = []
        if name in _FORMATTED_STARTS:
            fields.append(0)
        elif name in _FORMATTED_ENDS:
            fields.pop()
        elif name == "STRING":
            yield from _string_tokens(token.string, start, end)
        else:
            if fields and token.string in ("{", "}"):
                fields[-1] += 1 if token.string == "{" else -1
            yield from _plain_token(name, token.string, start, end)


def _plain_token(name: str, text: str, start: int, end: int) -> Iterator[CodeToken]:
    match name:
        case "NAME":
            yield CodeToken("keyword" if keyword.iskeyword(text) else "name", text, start, end)
        case "NUMBER":
            yield CodeToken("number", number_value(text), start, end)
        case "NEWLINE":
            yield CodeToken("newline", "", start, max(start, end))
        case "OP" | "ERRORTOKEN" if text.strip():
            yield CodeToken("operator", text.strip(), start, end)


def _string_tokens(text: str, start: int, end: int) -> Iterator[CodeToken]:
    quote = min((at for at in (text.find("'"), text.find('"')) if at >= 0), default=0)
    value = string_value(text)
    if "f" not in text[:quote].lower():
        yield CodeToken("string", value, start, end)
        return
    for is_expression, part in _formatted_parts(value):  # Python before 3.12
        if is_expression:
            yield from (token._replace(start=start, end=end) for token in _all_tokens(part) if token.kind != "newline")
        elif part:
            yield CodeToken("string", part, start, end)


def _formatted_parts(value: str) -> Iterator[tuple[bool, str]]:
    """Yields the parts of a formatted string, and whether each is an expression. Formats are left out."""
    text, at = io.StringIO(), 0
    while at < len(value):
        letter = value[at]
        if value[at : at + 2] in ("{{", "}}"):
            text.write(letter)
            at += 2
        elif letter == "{":
            yield False, text.getvalue()
            text = io.StringIO()
            end = _end_of_field(value, at)
            yield True, _expression(value[at + 1 : end])
            at = end + 1
        else:
            text.write(letter)
            at += 1
    yield False, text.getvalue()


def _end_of_field(value: str, opened: int) -> int:
    depth = 0
    for at in range(opened, len(value)):
        depth += (value[at] == "{") - (value[at] == "}")
        if depth == 0:
            return at
    return len(value)


def _expression(field: str) -> str:
    """Returns a field without its format and conversion."""
    depth = 0
    for at, letter in enumerate(field):
        depth += (letter in "([{") - (letter in ")]}")
        if depth == 0 and (letter == ":" or (letter == "!" and field[at + 1 : at + 2] != "=")):
            return field[:at]
    return field.removesuffix("=")


def _next_row(lines: list[tuple[int, str]], first: int, error: Exception) -> int:
    """Returns the row from which the tokenizer continues. It has yielded all tokens before the error."""
    message = str(error.args[0]) if error.args else ""
    if "multi-line statement" in message:  # a bracket is open at the end
        return len(lines)
    row, column = error.args[1][:2] if isinstance(error, tokenize.TokenError) else (error.lineno or 1, 0)
    failed = min(max(first + row - 1, first), len(lines) - 1)
    if "multi-line string" not in message and "triple-quoted" not in message:
        return _without_refused(lines, failed, column - 1)  # Python 3.12 and newer
    at = max((lines[failed][1].find(quote, max(column - 4, 0)) for quote in TRIPLE_QUOTES), default=-1)
    for index in range(failed, len(lines)):
        begin, text = lines[index]
        for quote in TRIPLE_QUOTES:
            text = text.replace(quote, "   ")
        lines[index] = begin, text
    if at < 0:
        return failed + 1
    begin, text = lines[failed]
    rest = text[at:].lstrip()  # what precedes it was read
    lines[failed] = begin + len(text) - len(rest), rest or "\n"
    return failed


def _without_refused(lines: list[tuple[int, str]], row: int, column: int) -> int:
    """Leaves out one character of a line, and what was read before it. Returns the row to continue from."""
    begin, text = lines[row]
    if not 0 <= column < len(text) - 1:
        return row + 1
    rest = text[column + 1 :].lstrip(" \t\f")
    lines[row] = begin + len(text) - len(rest), rest
    return row


def _without_docstrings(tokens: Iterator[CodeToken]) -> Iterator[CodeToken]:
    """Yields the tokens except strings that are statements of their own, which are comments."""
    statement: list[CodeToken] = []
    for token in tokens:
        statement.append(token)
        if token.kind == "newline":
            yield from statement if any(one.kind not in ("string", "newline") for one in statement) else [token]
            statement = []
    yield from statement
