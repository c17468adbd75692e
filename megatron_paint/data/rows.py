"""Reads rows of JSONL and Parquet files and of `datasets`. Each row has its file and line."""

import difflib
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from megatron_paint.base.errors import UserError

JSONL_ENDINGS = (".jsonl", ".ndjson", ".json")


class Row(NamedTuple):
    """One row of a source: its values, or the reason why it cannot be read."""

    where: str  # "file:line", for messages
    name: str  # "file stem:line", used as id if the source has no ids
    values: dict[str, Any] | None
    broken: str = ""


def read_rows(source: str, *, format: str, split: str, setting: str) -> list[Row]:
    """Returns all rows of a source in their order. A broken row is in the list with its reason.

    format: auto, jsonl, parquet or datasets. auto uses the file's ending; anything else is a name for `datasets`.
    setting: named in the errors. Raises UserError if the source is missing, empty or unreadable.
    """
    path = Path(source)
    if format == "auto":
        format = _format_of(path)
    try:
        match format:
            case "jsonl":
                rows = list(_jsonl_rows(path))
            case "parquet":
                rows = list(_parquet_rows(path))
            case _:
                rows = list(_dataset_rows(source, split))
    except FileNotFoundError as error:
        raise UserError(f"{setting}: there is no file {source}.{_beside(path)}") from error
    except OSError as error:
        raise UserError(f"{setting}: {source} cannot be read ({error})") from error
    if not rows:
        raise UserError(f"{setting}: {source} has no rows")
    return rows


def nearest(name: str, known: Collection[str]) -> str:
    """Returns a sentence with the known name nearest to a wrong one; an empty text if no name is near."""
    close = difflib.get_close_matches(name, sorted(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def _format_of(path: Path) -> str:
    if path.suffix in JSONL_ENDINGS:
        return "jsonl"
    if path.suffix == ".parquet":
        return "parquet"
    if path.is_file():
        raise UserError(f"{path}: the format is unknown from this ending; set format: jsonl or parquet")
    return "datasets"


def _beside(path: Path) -> str:
    folder = path.parent
    return nearest(path.name, [entry.name for entry in folder.iterdir()]) if folder.is_dir() else ""


def _jsonl_rows(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _jsonl_row(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line, path, number)


def _jsonl_row(line: bytes, path: Path, number: int) -> Row:
    where, name = f"{path}:{number}", f"{path.stem}:{number}"
    try:
        values = json.loads(line.decode().rstrip())
    except UnicodeDecodeError as error:
        return Row(where, name, None, f"not UTF-8: byte 0x{line[error.start]:02x} at byte {error.start} of the line")
    except json.JSONDecodeError as error:
        message = error.msg.removesuffix(" at")
        return Row(where, name, None, f"not JSON: {message} at character {error.pos} of the line")
    except (ValueError, RecursionError) as error:
        return Row(where, name, None, f"not readable as JSON: {error}")
    if not isinstance(values, dict):
        return Row(where, name, None, f"contains a {type(values).__name__}; a line must be one JSON object")
    return Row(where, name, values)


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for values in _batch_values(batch):
                    number += 1
                    where, name = f"{path}:{number}", f"{path.stem}:{number}"
                    if values is None:
                        yield Row(where, name, None, "a text of the row is not UTF-8")
                    else:
                        yield Row(where, name, values)
    except pa.ArrowInvalid as error:
        raise UserError(f"{path}: not a readable Parquet file ({error})") from error


def _batch_values(batch: Any) -> Iterator[dict[str, Any] | None]:
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for index in range(batch.num_rows):
            try:
                yield batch.slice(index, 1).to_pylist()[0]
            except UnicodeDecodeError:
                yield None


def _dataset_rows(source: str, split: str) -> Iterator[Row]:
    """Reads a folder of `save_to_disk`, or a folder, a name or a name:configuration for `load_dataset`."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"{source} is no file. To load it by name you need the package `datasets`: pip install datasets"
        ) from error
    path = Path(source)
    try:
        if path.is_dir() and ((path / "state.json").is_file() or (path / "dataset_dict.json").is_file()):
            table = datasets.load_from_disk(source)
            if isinstance(table, datasets.DatasetDict):
                table = table[split]
        else:
            name, _, configuration = (source, "", "") if path.exists() else source.partition(":")
            table = datasets.load_dataset(name, configuration or None, split=split)
    except Exception as error:  # the library raises many kinds of errors, also for the network and the hub
        raise UserError(
            f"{source} is no file, and `datasets` cannot load its split {split!r}: {type(error).__name__}: {error}"
        ) from error
    for number, values in enumerate(table, start=1):
        yield Row(f"{source}[{split}]:{number}", f"{path.name}:{number}", values)
