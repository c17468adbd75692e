"""Reads the rows of a source: a file, a folder, or a name for the library `datasets`.

| ending | format |
|---|---|
| .jsonl .ndjson .json | json: one object a line, one array of objects, or objects over several lines |
| .csv .tsv | csv: a header, then a row a line |
| .parquet .pq | parquet |
| a folder, or no file | datasets |

A json or csv file may be compressed; .gz .zst .bz2 .xz may follow its ending.
"""

from collections.abc import Collection, Iterator
from pathlib import Path

from megatron_paint.base.errors import UserError
from megatron_paint.data.data_file import DECOMPRESSION_ERRORS, check_content, format_of_ending, stem_of
from megatron_paint.data.json_rows import json_rows
from megatron_paint.data.rows import Row, listed, nearest
from megatron_paint.data.table_rows import csv_rows, dataset_rows, parquet_rows

_READERS = {"json": json_rows, "jsonl": json_rows, "csv": csv_rows, "parquet": parquet_rows}


def read_rows(
    source: str, *, format: str, split: str, setting: str, needed: Collection[str] | None = None
) -> Iterator[Row]:
    """Yields all rows of a source in their order. A broken row is among them with its reason.

    format: auto, json, jsonl (the same), csv, parquet or datasets. auto uses the ending; anything else is a name for
    `datasets`. setting: data.train or evaluation.problems, for the errors. needed: the names of the columns that are
    used, which spare the reader of Parquet the others; None: all are. Raises UserError, at the latest after the last
    row, if the source is missing, empty, damaged or of another format.
    """
    path = Path(source)
    format = _format_of(source, setting) if format == "auto" else format
    empty = True
    try:
        if format == "datasets":
            found = dataset_rows(source, split, setting=setting)
        else:
            _check_is_file(path, format, setting)
            check_content(path, setting=setting, parquet=format == "parquet")
            options = {"needed": needed} if format == "parquet" else {}
            found = _READERS[format](path, stem=stem_of(path), setting=setting, **options)
        for row in found:
            empty = False
            yield row
    except FileNotFoundError as error:
        raise UserError(f"{setting}: there is no file {source}.{_beside(path)}") from error
    except DECOMPRESSION_ERRORS as error:
        raise UserError(_damaged(path, error, setting)) from error
    except OSError as error:
        if error.errno is None:  # of a library that unpacks
            raise UserError(_damaged(path, error, setting)) from error
        raise UserError(f"{setting}: {source} cannot be read ({error})") from error
    if empty:
        raise UserError(f"{setting}: {source} has no rows")


def is_data_file(source: str) -> bool:
    """Tells whether a source has the ending of a data file."""
    return format_of_ending(Path(source)) is not None


def _format_of(source: str, setting: str) -> str:
    path = Path(source)
    if "://" in source:
        raise UserError(f"{setting}: {source} is an address; download the file and name it here")
    if path.is_dir():
        return "datasets"
    format = format_of_ending(path)
    if format is not None:
        return format
    if path.is_file():
        section = setting.partition(".")[0]
        raise UserError(
            f"{setting}: {source}: the format is unknown from this ending; set {section}.format: json, csv or parquet"
        )
    if source.startswith(("/", "./", "../", "~")) or source.count("/") > 1:
        raise UserError(f"{setting}: there is no file or folder {source}.{_beside(path)}")
    return "datasets"


def _check_is_file(path: Path, format: str, setting: str) -> None:
    if not path.is_dir():
        return
    files = [entry.name for entry in path.iterdir() if format_of_ending(entry)]
    found = f"name one of its files: {listed(files)}" if files else "name a file"
    section = setting.partition(".")[0]
    raise UserError(
        f"{setting}: {path} cannot be read as {format}: it is a folder; {found}, or set {section}.format: datasets"
    )


def _beside(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f" There is no folder {folder} either."
    return nearest(path.name, [entry.name for entry in folder.iterdir()])


def _damaged(path: Path, error: Exception, setting: str) -> str:
    return f"{setting}: {path} cannot be unpacked ({error}): it is cut short or damaged; copy it again"
