"""What a rank that failed leaves for the launcher that started it, which prints one note of many."""

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

FOLDER = "MEGATRON_PAINT_NOTES"  # variable with the folder of the notes


@dataclass(frozen=True, kw_only=True)
class Note:
    """Why one rank ended."""

    text: str
    mistake: bool  # of the user's; else a bug, and `text` is its traceback
    time_ns: int  # of the machine's one monotonic clock: the first failure is the cause of the others


def leave_note(text: str, *, mistake: bool) -> bool:
    """Leaves a note; False where no launcher of ours started this process."""
    folder = os.environ.get(FOLDER)
    if folder is None:
        return False
    note = Note(text=text, mistake=mistake, time_ns=time.monotonic_ns())
    unfinished = Path(folder) / f"unfinished{os.getpid()}"
    unfinished.write_text(json.dumps(asdict(note)), encoding="utf-8")
    unfinished.rename(Path(folder) / f"{os.getpid()}.json")
    return True


def read_notes(folder: str | Path) -> list[Note]:
    """The notes that are whole, the earliest first."""
    notes = [Note(**json.loads(path.read_text(encoding="utf-8"))) for path in Path(folder).glob("*.json")]
    return sorted(notes, key=lambda note: note.time_ns)
