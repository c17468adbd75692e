"""One row of a source, and sentences that name the columns and files that exist."""

import difflib
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

NAMES_SHOWN = 20
NAME_LENGTH = 60  # characters of a name in a message; a file without a header has texts in place of names


class Row(NamedTuple):
    """One row of a source: its values, or the reason why it cannot be read."""

    where: str  # "file:line", for messages
    name: str  # "file stem:line", used as id if the source has no ids
    values: dict[str, Any] | None
    broken: str = ""


def kind_of(value: Any) -> str:
    """Returns what a value is in JSON: `null`, `text`, `a number`, `true or false`, `a list` or `an object`."""
    names = {type(None): "null", str: "text", bool: "true or false", int: "a number", float: "a number"}
    names |= {list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def repeated(names: Iterable[str]) -> str | None:
    """Returns the first name that is there twice; None if all differ."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def nearest(name: str, known: Collection[str]) -> str:
    """Returns a sentence with the known name nearest to a wrong one; an empty text if no name is near."""
    close = difflib.get_close_matches(name, sorted(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def listed(names: Collection[str]) -> str:
    """Returns the sorted names with commas between them. Long names are cut, and only the first 20 are shown."""
    short = [name if len(name) <= NAME_LENGTH else name[:NAME_LENGTH] + "..." for name in sorted(names)]
    more = f" and {len(short) - NAMES_SHOWN} more" if len(short) > NAMES_SHOWN else ""
    return ", ".join(short[:NAMES_SHOWN]) + more
