"""Builds the report of one run or several: the data of the page, and the pages of their samples and answers."""

import gc
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_paint import __version__
from megatron_paint.base.errors import UserError
from megatron_paint.report.curves import meanings, plots_for
from megatron_paint.report.page import render
from megatron_paint.report.pages import MOST_INLINE_BYTES, PageStore, encode
from megatron_paint.report.reader import RunData, RunReader, answer_columns, sample_columns
from megatron_paint.report.samples import QUANTITIES
from megatron_paint.report.settings_table import settings_rows
from megatron_paint.runtime.files import disk_errors, write_atomically


@dataclass(frozen=True, kw_only=True)
class Written:
    """What was written."""

    file: Path
    folder: Path | None  # of the pages; None: the file holds them
    samples: int
    notices: tuple[str, ...]  # of the runs: what is missing or damaged
    seconds: float
    bytes: int  # of all files


def write_report(runs: Sequence[Path], out: Path, *, budget: int = MOST_INLINE_BYTES) -> Written:
    """Writes the report of the runs to the file `out`, and its pages beside it if they do not fit.

    budget: bytes of pages that the file may hold. UserError: a folder is not a run folder, two are the same, or the
    writing to the disk fails.
    """
    begun = time.monotonic()
    readers = make_readers(runs)
    store = PageStore(out, budget=budget)
    with disk_errors(out), _without_collector():
        found = [
            reader.read(lambda key, content, number=number: store.add(f"r{number}_{key}", encode(content)))
            for number, reader in enumerate(readers)
        ]
        folder = store.finish()
    data = report_data(runs, found)
    data["pages"] = None if folder is None else folder.name
    page = render(data, title=title_of(data), pages=store.inline)
    write_atomically(out, page)
    return Written(
        file=out,
        folder=folder,
        samples=len(data["samples"]["run"]),
        notices=tuple(notice for run in data["runs"] for notice in run["notices"]),
        seconds=time.monotonic() - begun,
        bytes=out.stat().st_size + store.bytes_beside,
    )


@contextmanager
def _without_collector() -> Iterator[None]:
    """Samples are lists without cycles. The garbage collector would take half of the time of reading them."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def make_readers(runs: Sequence[Path]) -> list[RunReader]:
    """A reader for each folder. UserError: a folder is not a run folder, or is given twice."""
    same = [path for path in runs if sum(path.resolve() == other.resolve() for other in runs) > 1]
    if same:
        raise UserError(f"{same[0]} is given twice; name each run once")
    readers = [RunReader(path) for path in runs]
    for reader in readers:
        reader.check()
    return readers


def report_data(paths: Sequence[Path], runs: Sequence[RunData]) -> dict[str, Any]:
    """Everything that the page shows, except the pages of samples and answers."""
    keys = list(dict.fromkeys(key for run in runs for key in run.summary["metrics"]))
    return {
        "version": __version__,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "live": False,
        "runs": [{"name": name, **run.summary} for name, run in zip(names_of(paths), runs, strict=True)],
        "plots": plots_for(keys),
        "meanings": meanings(keys),
        "settings": settings_rows([run.tree for run in runs]),
        "samples": sample_columns(runs),
        "answers": answer_columns(runs),
        "quantities": {name: list(words) for name, words in QUANTITIES.items()},
        "pages": None,
    }


def title_of(data: dict[str, Any]) -> str:
    """The title of the page."""
    return f"{', '.join(run['name'] for run in data['runs'])} - megatron-paint report"


def names_of(paths: Sequence[Path]) -> list[str]:
    """A short name for each run: the end of its path that no other run has."""
    parts = [Path(os.path.abspath(path)).parts[1:] or ("/",) for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return ["/".join(part) for part in parts]
