"""Failure notes: a failed rank writes one for its launcher, which prints the earliest of them."""

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

NOTES_FOLDER = "MEGATRON_PAINT_NOTES"  # environment variable with the folder of the notes


@dataclass(frozen=True, kw_only=True)
class FailureNote:
    """Why one rank ended."""

    text: str
    mistake: bool  # a mistake of the user; else a bug, and `text` is its traceback
    time_ns: int  # of the machine's monotonic clock; the first failure caused the others


def leave_failure_note(text: str, *, mistake: bool) -> bool:
    """Writes a note; returns False if no launcher of ours started this process."""
    folder = os.environ.get(NOTES_FOLDER)
    if folder is None:
        return False
    note = FailureNote(text=text, mistake=mistake, time_ns=time.monotonic_ns())
    unfinished = Path(folder) / f"unfinished{os.getpid()}"
    unfinished.write_text(json.dumps(asdict(note)), encoding="utf-8")
    unfinished.rename(Path(folder) / f"{os.getpid()}.json")
    return True


def read_failure_notes(folder: str | Path) -> list[FailureNote]:
    """All complete notes, the earliest first."""
    notes = [FailureNote(**json.loads(path.read_text(encoding="utf-8"))) for path in Path(folder).glob("*.json")]
    return sorted(notes, key=lambda note: note.time_ns)
