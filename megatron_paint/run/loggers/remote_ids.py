"""RUN/loggers.json: which runs of other services show this run, so that a resumed run continues them."""

import json
import threading
from collections.abc import Mapping
from pathlib import Path

from megatron_paint.base.json_text import to_json
from megatron_paint.runtime.files import write_atomically

LOGGERS = "loggers.json"
_writing = threading.Lock()  # each logger writes in its own thread


def read_ids(folder: Path, logger: str) -> dict[str, str]:
    """What `write_ids` has stored for this logger; empty: nothing, or the file is damaged."""
    try:
        found = json.loads((folder / LOGGERS).read_text(encoding="utf-8"))[logger]
        return {str(name): str(value) for name, value in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def write_ids(folder: Path, logger: str, ids: Mapping[str, str]) -> None:
    """Stores the ids of one logger. It keeps those of the others."""
    with _writing:
        try:
            stored = json.loads((folder / LOGGERS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            stored = {}
        if not isinstance(stored, dict):
            stored = {}
        write_atomically(folder / LOGGERS, to_json({**stored, logger: dict(ids)}, indent=1) + "\n")
