"""Reads rows of CSV, of Parquet and of the library `datasets`."""

import csv
import itertools
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_paint.base.errors import UserError
from megatron_paint.data.columns import ROWS_LOOKED_INTO
from megatron_paint.data.data_file import check_content, format_of_ending, open_data
from megatron_paint.data.json_rows import BYTE_ORDER_MARK, NOT_UTF8
from megatron_paint.data.rows import Row, listed, nearest, repeated

DELIMITERS = (",", ";", "\t")
LONGEST_FIELD = 2**30  # characters; the library's own limit is 131,072
BATCH_ROWS = 4096


def csv_rows(path: Path, *, stem: str, setting: str) -> Iterator[Row]:
    """Yields the rows of a CSV file with a header. The header's most frequent one of `,` `;` and tab separates fields.

    Every value is text, and an empty field is an empty text. Raises UserError for a header with a name twice, an open
    quotation mark and other encodings than UTF-8.
    """
    longest = csv.field_size_limit(LONGEST_FIELD)
    before = 0  # lines before the row
    try:
        with open_data(path) as file:
            lines = _text_lines(file, path, setting)
            begin = []  # blank lines and the header's first line
            while not "".join(begin).strip() and (line := next(lines, "")):
                begin.append(line)
            delimiter = max(DELIMITERS, key="".join(begin).count)
            reader = csv.reader(itertools.chain(begin, lines), delimiter=delimiter, strict=True)
            header = next((names for names in reader if names), [])
            if (twice := repeated(header)) is not None:
                raise UserError(f"{setting}: {path}: its header has {twice!r} twice; rename one of the two columns")
            before = reader.line_num
            for values in reader:
                where, name, before = f"{path}:{before + 1}", f"{stem}:{before + 1}", reader.line_num
                if len(values) == len(header):
                    yield Row(where, name, dict(zip(header, values, strict=True)))
                elif values:
                    broken = (
                        f"has {len(values)} fields, and the header has {len(header)}; put a field with {delimiter!r} "
                        "in it between quotation marks"
                    )
                    yield Row(where, name, None, broken)
    except csv.Error as error:
        raise UserError(
            f"{setting}: {path} is not valid CSV: {error} (in the row that begins in line {before + 1}). A quotation "
            'mark inside a quoted field is written twice: ""'
        ) from error
    finally:
        csv.field_size_limit(longest)


def _text_lines(file: Any, path: Path, setting: str) -> Iterator[str]:
    for number, line in enumerate(file, start=1):
        try:
            yield (line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line).decode()
        except UnicodeDecodeError as error:
            byte = line[error.start]
            raise UserError(
                f"{setting}: {path} is not UTF-8: byte 0x{byte:02x} in line {number}. {NOT_UTF8}"
            ) from error


def parquet_rows(path: Path, *, stem: str, setting: str, needed: Collection[str] | None = None) -> Iterator[Row]:
    """Yields the rows of a Parquet file. A row with broken UTF-8 is a bad row.

    needed: the columns that are used, with dots into objects; None: all. After the rows that messages are made of, no
    other column is read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            if (twice := _repeated_field(list(file.schema_arrow))) is not None:
                raise UserError(f"{setting}: {path}: its schema has {twice!r} twice; rename one of the two columns")
            names = file.schema_arrow.names
            roots = [name for name in names if needed is None or _is_used(name, needed)] or names
            for batch in _batches(file, roots):
                for values in _batch_values(batch, roots):
                    number += 1
                    where, name = f"{path}:{number}", f"{stem}:{number}"
                    if values is None:
                        yield Row(where, name, None, "a text of the row is not UTF-8")
                    else:
                        yield Row(where, name, values)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the disk
        reason = " ".join(str(error).split())
        raise UserError(
            f"{setting}: {path}: not a readable Parquet file ({reason}). It may be cut short: copy it again"
        ) from error


def _repeated_field(fields: Sequence[Any]) -> str | None:
    """Returns the first name that a schema or an object inside it has twice, with dots; None if there is none."""
    import pyarrow as pa

    if (twice := repeated([field.name for field in fields])) is not None:
        return twice
    for field in fields:
        kind = field.type
        while pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
            kind = kind.value_type
        inside = [kind.field(index) for index in range(kind.num_fields)] if pa.types.is_struct(kind) else []
        if (twice := _repeated_field(inside)) is not None:
            return f"{field.name}.{twice}"
    return None


def _is_used(name: str, needed: Collection[str]) -> bool:
    return any(column == name or column.startswith(f"{name}.") for column in needed)


def _batches(file: Any, roots: list[str]) -> Iterator[Any]:
    """Yields the first rows with all columns, for messages that name them, and all others with these columns alone."""
    before = 0
    for first in itertools.islice(file.iter_batches(ROWS_LOOKED_INTO), 1):
        yield first
        before = first.num_rows
    for batch in file.iter_batches(BATCH_ROWS, columns=roots):
        yield batch.slice(before)
        before = max(0, before - batch.num_rows)


def _batch_values(batch: Any, roots: list[str]) -> Iterator[dict[str, Any] | None]:
    """Yields the values of each row: all, or those of `roots` if another text is not UTF-8; None if one of these is."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for index in range(batch.num_rows):
            try:
                yield batch.slice(index, 1).select(roots).to_pylist()[0]
            except UnicodeDecodeError:
                yield None


def dataset_rows(source: str, split: str, *, setting: str) -> Iterator[Row]:
    """Yields the rows of a folder of `save_to_disk`, or of a folder, a name or a name:configuration."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"{setting}: {source} is no file. To load it by name you need the package `datasets`: pip install datasets"
        ) from error
    path = Path(source)
    saved = path.is_dir() and ((path / "state.json").is_file() or (path / "dataset_dict.json").is_file())
    try:
        if saved:
            table = datasets.load_from_disk(source)
            if isinstance(table, dict):
                table = _split_of(table, split, source=source, setting=setting)
        else:
            name, _, configuration = (source, "", "") if path.exists() else source.partition(":")
            table = datasets.load_dataset(name, configuration or None, split=split)
    except UserError:
        raise
    except Exception as error:  # the library raises many kinds of errors, also for the network and the hub
        raise UserError(_not_loaded(error, source, split, setting)) from error
    for number, values in enumerate(table, start=1):
        yield Row(f"{source}[{split}]:{number}", f"{path.name}:{number}", values)


def _split_of(splits: dict[str, Any], split: str, *, source: str, setting: str) -> Any:
    if split in splits:
        return splits[split]
    raise UserError(
        f"{setting}: `datasets` cannot load its split {split!r} of {source}; its splits are {listed(splits)}."
        f"{nearest(split, splits)} Set {setting.partition('.')[0]}.split"
    )


def _not_loaded(error: Exception, source: str, split: str, setting: str) -> str:
    """Returns the message. Raises UserError if a file of a folder holds no rows, which explains more."""
    section, path = setting.partition(".")[0], Path(source)
    reason = f"{type(error).__name__}: {error}"
    if "split" in str(error).lower():
        fix = f"Set {section}.split to a split that exists"
    elif path.is_dir():
        files = sorted(entry for entry in path.rglob("*") if format_of_ending(entry))
        for file in files:
            check_content(file, setting=setting, parquet=format_of_ending(file) == "parquet")
        found = f"its data files are {listed([file.name for file in files])}" if files else "it has no data file"
        fix = f"Name a file: {found}"
    else:
        arguments = ", ".join(repr(part) for part in source.split(":", 1))
        fix = (
            "If it is on the Hugging Face hub, load it once on a machine with a network and the same HF_HOME: "
            f'`python -c "import datasets; datasets.load_dataset({arguments})"`'
        )
    what = "is a folder" if path.is_dir() else "is no file"
    return f"{setting}: {source} {what}, and `datasets` cannot load its split {split!r}: {reason}. {fix}"
