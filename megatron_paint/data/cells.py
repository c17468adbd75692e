"""Turns the values of a row into the texts of a problem. A value that cannot be one raises BadRow."""

import json
import re
from collections.abc import Collection
from typing import Any, Literal, NamedTuple

from megatron_paint.base.counts import count_text
from megatron_paint.data.messages import is_messages, messages_in, read_messages
from megatron_paint.data.rows import kind_of

USED_ID = "repeats an id"  # the fault of a row whose id an earlier row has
LARGEST_EXACT_FLOAT = 2**53
MOST_CHOICES = 26  # A to Z
RESULT_MARK = "####"
RESULT = re.compile(r"(?:^|\n)[ \t]*####(?!#)[ \t]*(?P<result>[^\n]*?)\s*$")
GROUPED = re.compile(r"-?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?")  # 1,250

Form = Literal["text", "marked", "list"]


class BadRow(ValueError):
    """A row cannot be used. The text is the reason.

    role: the column at fault, as ColumnSettings names it. fault: what its value is. If all rows have the same two, the
    fault is that of a setting or of the file, and `fix` mends it; if it is empty, the columns decide.
    """

    def __init__(self, reason: str, *, role: str = "", fault: str = "", fix: str = ""):
        super().__init__(reason)
        self.role, self.fault, self.fix = role, fault, fix


class Cell(NamedTuple):
    """One value of a row, with its place for messages."""

    role: str
    column: str
    value: Any  # None: missing

    def bad(self, fault: str, more: str = "") -> BadRow:
        """Returns the error for this value."""
        return BadRow(f"column {self.column!r} {fault}{more}", role=self.role, fault=fault)


def text_of(cell: Cell) -> str:
    """Returns a text that is not blank, byte for byte."""
    value = cell.value
    if value is None:
        raise cell.bad("is missing")
    if not isinstance(value, str):
        raise cell.bad(f"holds {kind_of(value)}, not text")
    if not value.strip():
        raise cell.bad("is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise cell.bad("is broken Unicode", f": a lone surrogate at character {error.start}") from error
    return value


def problem_of(cell: Cell) -> tuple[str, str]:
    """Returns the text of a problem and that of its system message, which is empty if there is none."""
    try:
        messages = messages_in(cell.value) if isinstance(cell.value, str) else cell.value
        if not is_messages(messages):
            return text_of(cell), ""
        problem, system = read_messages(messages)
    except BadRow:
        raise
    except ValueError as error:
        raise cell.bad(str(error)) from error
    return text_of(cell._replace(value=problem)), system


def id_of(cell: Cell) -> str:
    """Returns an id. A whole number may be one, also as a float: a column of integers and nulls has floats."""
    value = cell.value
    if isinstance(value, float) and value.is_integer() and abs(value) < LARGEST_EXACT_FLOAT:
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return text_of(cell)


def optional_text_of(cell: Cell) -> str:
    """Returns a text that nothing needs; an empty text in place of any other value."""
    try:
        return text_of(cell)
    except BadRow:
        return ""


def answer_of(cell: Cell) -> tuple[str, Form]:
    """Returns the answer as text, and the form in which it was written.

    A number is accepted if there is only one way to write it. marked: the value is a worked solution that ends in a
    line "#### RESULT" (GSM8K), and the answer is the result. list: the value is a JSON list of one text. Raises BadRow
    for the mark in any other place, because the grader would take what follows it for the answer.
    """
    value = cell.value
    if isinstance(value, float):
        if value.is_integer() and abs(value) < LARGEST_EXACT_FLOAT:
            return str(int(value)), "text"
        text = repr(value)
        if not text.lstrip("-").replace(".", "").isdigit():
            raise cell.bad(f"holds the number {text}", "; write the answer as text")
        return text, "text"
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | int | float):
        raise cell.bad("holds a list, not text", f"; its one entry is the column {cell.column + '.0'!r}")
    text, form = _only_entry(cell, id_of(cell))
    if RESULT_MARK not in text:
        return text, form
    found = RESULT.search(text)
    if found is None:
        raise cell.bad(
            f"has {RESULT_MARK!r} in another place than a last line '{RESULT_MARK} RESULT'",
            "; write the answer alone, or add this line",
        )
    result = found["result"]
    if not result:
        raise cell.bad(f"has nothing after {RESULT_MARK!r}")
    return result.replace(",", "") if GROUPED.fullmatch(result) else result, "marked"


def domain_of_row(cell: Cell, *, default: str, known: Collection[str]) -> str:
    """Returns the domain of a row. A row without one has the default. Raises BadRow for an unknown name."""
    if cell.value is None or cell.value == "":
        return default
    name = text_of(cell)
    if name not in known:
        raise BadRow(
            f"column {cell.column!r} names the domain {name!r}; the domains are {', '.join(known)}",
            role=cell.role,
            fault="names an unknown domain",
            fix=f"The first is {name!r}, and the domains are {', '.join(known)}. Add yours to the section domains",
        )
    return name


def choices_of(cell: Cell) -> tuple[str, ...]:
    """Returns the texts of the choices: a list of texts or numbers, or the same as JSON text. A row may have none."""
    value = cell.value
    if value is None or value == "":
        return ()
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = cell.value
    if not isinstance(value, list) or not 2 <= len(value) <= MOST_CHOICES:
        raise cell.bad(f"holds no list of 2 to {MOST_CHOICES} choices")
    texts = [repr(entry) if isinstance(entry, float) else entry for entry in value]
    return tuple(id_of(cell._replace(value=text)) for text in texts)


def answer_for_function(cell: Cell) -> str:
    """Returns an answer that a user's function reads: any text, a number, or a list or an object as JSON text."""
    value = cell.value
    if isinstance(value, str):
        return text_of(cell)
    if not isinstance(value, list | dict):
        return answer_of(cell)[0]
    try:
        return json.dumps(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise cell.bad("holds what JSON cannot write", f" ({error})") from error


def _only_entry(cell: Cell, text: str) -> tuple[str, Form]:
    """Returns the one text of a JSON list; any other text as it is. Raises BadRow for a list of several answers."""
    if not (text.startswith('["') and text.endswith('"]')):
        return text, "text"
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError):
        return text, "text"
    if len(entries) != 1:
        raise cell.bad(f"holds a list of {count_text(len(entries), 'answer')}", "; write one answer a row")
    return text_of(cell._replace(value=entries[0])), "list"
