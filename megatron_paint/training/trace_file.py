"""Writes what torch's profiler recorded as one file, complete or not at all."""

import gzip
import json
import os
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from megatron_paint.base.errors import UserError
from megatron_paint.run.trace import Trace, TraceSummary, summarise
from megatron_paint.runtime.files import disk_errors

if TYPE_CHECKING:
    from torch.profiler import profile

LEVEL = 3  # of the compression. Of 82 MB, level 1 makes 6.4 MB, level 6 5.2 MB in 3 times the time
BASE = "baseTimeNanoseconds"  # what the times of a trace are relative to
ARROWS = ("s", "t", "f")  # events that have an id, the same at both ends of an arrow
ID_STEP = 1 << 32  # keeps the arrows of different parts apart


def write_trace(parts: Sequence["profile"], path: Path, *, phases: Collection[str]) -> TraceSummary:
    """Writes a compressed trace and returns what takes its time. UserError: the disk refuses; no file is left then.

    parts: what was recorded, in the order of time; several parts become one trace. phases: the names of the ranges that
    are phases.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    plain = [unfinished.with_name(f".{path.name}.{os.getpid()}.part{index}") for index in range(len(parts))]
    try:
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            for part, file in zip(parts, plain, strict=True):
                part.export_chrome_trace(str(file))
            merged = Merged(plain)
            try:
                summary = summarise(merged, phases)
            except (FileNotFoundError, ValueError) as error:  # torch reports nothing where the disk refuses
                raise UserError(
                    f"Cannot write {path}: torch's profiler wrote no complete trace, probably because the disk is "
                    "full; free space there, or write to another disk"
                ) from error
            with gzip.open(unfinished, "wb", compresslevel=LEVEL) as target:
                merged.copy_to(target)
            os.replace(unfinished, path)
    finally:
        for file in plain:  # torch writes FILE.tmp, then renames it
            with suppress(OSError):
                file.with_name(f"{file.name}.tmp").unlink(missing_ok=True)
                file.unlink(missing_ok=True)
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
    return summary


class Merged:
    """The events of several traces of one process, as those of one trace."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._traces = [Trace(file) for file in files]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        first = self._traces[0]
        for index, trace in enumerate(self._traces):
            for event in trace:
                if index and "ts" in event:
                    event["ts"] += (trace.header.get(BASE, 0) - first.header.get(BASE, 0)) / 1000
                if index and event.get("ph") in ARROWS:
                    event["id"] += index * ID_STEP
                yield event

    def copy_to(self, target: IO[bytes]) -> None:
        """Writes them as a file; a single trace is copied as it is."""
        if len(self._traces) == 1:
            with open(self._traces[0].path, "rb") as source:
                shutil.copyfileobj(source, target, 1 << 20)
            return
        events = iter(self)
        first = json.dumps(next(events))  # reads the header too
        header = json.dumps({**self._traces[0].header, "traceEvents": []}).removesuffix("]}")
        target.write(f"{header}\n{first}".encode())
        for event in events:
            target.write(f",\n{json.dumps(event)}".encode())
        target.write(b"\n]}\n")
