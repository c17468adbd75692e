"""Reads rows of JSON: one object a line, one array of objects, or objects over several lines.

The first 64 KiB decide between the three. All are read in pieces: a file may be larger than the memory. In the first
layout a broken line is a bad row. In the other two nothing after a mistake can be read, so it is a fault of the file.
"""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from megatron_paint.base.errors import UserError
from megatron_paint.data.data_file import open_data, read_head
from megatron_paint.data.rows import Row, kind_of, repeated

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
PIECE = 2**20  # bytes
CUT_MARGIN = 16  # characters: a mistake nearer to the end of the text may come from the cut
NOT_UTF8 = "If it is in another encoding, convert it: `iconv -f WINDOWS-1252 -t UTF-8 FILE > NEW`"


def json_rows(path: Path, *, stem: str, setting: str) -> Iterator[Row]:
    """Yields the rows of a JSON file. `stem` begins their names.

    Raises UserError if the file is an array or a sequence of objects with a mistake in it, if no line of it is an
    object, or if it is not UTF-8.
    """
    head = read_head(path).removeprefix(BYTE_ORDER_MARK)
    if _begins_array(head):
        yield from _array_rows(path, stem, setting)
    elif _spans_lines(head):
        yield from _object_rows(path, stem, setting)
    else:
        yield from _line_rows(path, stem, setting)


def _begins_array(head: bytes) -> bool:
    """Tells whether the complete file is one array.

    A first line that is a list of anything but objects, with lines after it, is a bad row.
    """
    text = head.lstrip()
    if not text.startswith(b"["):
        return False
    line, newline, rest = text.partition(b"\n")
    return not (newline and rest.strip() and _is_json(line)) or line[1:].lstrip().startswith(b"{")


def _spans_lines(head: bytes) -> bool:
    """Tells whether the first object continues in the second line, as in the output of `jq`."""
    lines = [line.strip() for line in head.split(b"\n", 50) if line.strip()]
    if len(lines) < 2 or not lines[0].startswith(b"{") or _is_json(lines[0]):
        return False
    return lines[0] == b"{" or not lines[1].startswith(b"{")


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _line_rows(path: Path, stem: str, setting: str) -> Iterator[Row]:
    lines = objects = other_encoding = 0
    beyond_ascii = False  # a line with valid UTF-8 beyond ASCII
    first = ""
    parser = _JsonParser()
    with open_data(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            line = line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
            row = _line_row(line, parser, path, stem, number)
            lines += 1
            first = first or f"line {number}: {row.broken}"
            if row.values is not None:
                objects += 1
                beyond_ascii = beyond_ascii or not line.isascii()
            other_encoding += row.broken.startswith("not UTF-8")
            yield row
    if other_encoding > 1 and not beyond_ascii:
        raise UserError(
            f"{setting}: {path} is not UTF-8: {other_encoding} lines have other bytes, and no line has UTF-8 beyond "
            f"ASCII. {NOT_UTF8}"
        )
    if lines and not objects:
        section = setting.partition(".")[0]
        raise UserError(
            f"{setting}: no line of {path} is a JSON object ({first}). Write one object a line or one array of objects;"
            f" for CSV set {section}.format: csv"
        )


def _line_row(line: bytes, parser: "_JsonParser", path: Path, stem: str, number: int) -> Row:
    where, name = f"{path}:{number}", f"{stem}:{number}"
    parser.twice = None
    try:
        values = parser.decode(line.decode().rstrip())
    except UnicodeDecodeError as error:
        return Row(where, name, None, f"not UTF-8: byte 0x{line[error.start]:02x} at byte {error.start} of the line")
    except json.JSONDecodeError as error:
        cut = "" if line.endswith(b"\n") else ", the last one: the file may be cut short"
        message = error.msg.removesuffix(" at")
        return Row(where, name, None, f"not JSON: {message} at character {error.pos} of the line{cut}")
    except (ValueError, RecursionError) as error:
        return Row(where, name, None, f"not readable as JSON: {error}")
    if not isinstance(values, dict):
        return Row(where, name, None, f"contains {kind_of(values)}; a line must be one JSON object")
    if parser.twice is not None:
        return Row(where, name, None, f"has the key {parser.twice!r} twice in one object")
    return Row(where, name, values)


def _array_rows(path: Path, stem: str, setting: str) -> Iterator[Row]:
    with open_data(path) as file:
        text = _JsonText(file, path, setting)
        text.next()
        text.skip()  # the opening bracket
        number = 0
        if text.next() == "]":
            text.skip()
        else:
            while True:
                number += 1
                yield _entry_row(text, path, stem, number)
                mark = text.next()
                if mark not in (",", "]"):
                    found = "the file ends" if not mark else f"{mark!r} follows"
                    raise text.mistake(f"{found} after entry {number}, where a comma or the closing bracket belongs")
                text.skip()
                if mark == "]":
                    break
        if text.next():
            raise text.mistake("more text follows after the closing bracket of the array")


def _object_rows(path: Path, stem: str, setting: str) -> Iterator[Row]:
    with open_data(path) as file:
        text = _JsonText(file, path, setting)
        number = 0
        while text.next():
            number += 1
            yield _entry_row(text, path, stem, number)


def _entry_row(text: "_JsonText", path: Path, stem: str, number: int) -> Row:
    where, name = f"{path}: entry {number}", f"{stem}:{number}"
    values = text.value(number)
    if not isinstance(values, dict):
        return Row(where, name, None, f"contains {kind_of(values)}; an entry must be one JSON object")
    if text.parser.twice is not None:
        return Row(where, name, None, f"has the key {text.parser.twice!r} twice in one object")
    return Row(where, name, values)


class _JsonParser(json.JSONDecoder):
    """Parses JSON, and remembers in `twice` a key that an object has twice. Only the last one's value would be read."""

    def __init__(self) -> None:
        self.twice: str | None = None
        super().__init__(object_pairs_hook=self._object)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            self.twice = repeated(name for name, _ in pairs)
        return values


class _JsonText:
    """The text of a file from which one JSON value after another is taken. Only a piece of it is in memory."""

    def __init__(self, file: BinaryIO, path: Path, setting: str):
        self.file, self.path, self.setting = file, path, setting
        self.text, self.at, self.lines, self.ended = "", 0, 0, False  # lines: that were dropped
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.parser = _JsonParser()

    def next(self) -> str:
        """Skips white space. Returns the next character without taking it; an empty text at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in " \t\r\n":
                self.at += 1
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self._read()

    def skip(self) -> None:
        """Takes the character that `next` returned."""
        self.at += 1

    def value(self, number: int) -> Any:
        """Takes the value at this place. Raises UserError if there is none."""
        self.next()
        while True:
            self.parser.twice = None
            try:
                value, end = self.parser.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                far = error.pos < len(self.text) - CUT_MARGIN and not error.msg.startswith("Unterminated string")
                if far or self.ended:
                    ends = error.pos >= len(self.text.rstrip()) or error.msg.startswith("Unterminated string")
                    cut = "; the file ends there, so it may be cut short" if ends else ""
                    raise self.mistake(f"{error.msg.removesuffix(' at')} in entry {number}{cut}", error.pos) from error
            except (ValueError, RecursionError) as error:
                raise self.mistake(f"entry {number} is not readable as JSON: {error}") from error
            else:
                if end < len(self.text) or self.ended:  # otherwise a number may continue in the next piece
                    self.at = end
                    return value
            self._read()

    def mistake(self, reason: str, position: int | None = None) -> UserError:
        """Returns the error for a mistake at a position of the text in memory; None: at this place."""
        position = self.at if position is None else position
        line = self.lines + self.text.count("\n", 0, position) + 1
        column = position - self.text.rfind("\n", 0, position)
        return UserError(
            f"{self.setting}: {self.path} is not valid JSON: {reason} (line {line}, column {column}). Correct the file "
            "there, or write it again; nothing after a mistake can be read"
        )

    def _read(self) -> None:
        """Adds a piece, at least as long as what is left. A long value is then tried only a few times."""
        self.lines += self.text.count("\n", 0, self.at)
        left = self.text[self.at :]
        piece = self.file.read(max(PIECE, len(left)))
        try:
            more = self.decoder.decode(piece, final=not piece)
        except UnicodeDecodeError as error:
            line = self.lines + left.count("\n") + error.object.count(b"\n", 0, error.start) + 1
            byte = error.object[error.start]
            raise UserError(
                f"{self.setting}: {self.path} is not UTF-8: byte 0x{byte:02x} in line {line}. {NOT_UTF8}"
            ) from error
        self.text, self.at, self.ended = left + more, 0, not piece
