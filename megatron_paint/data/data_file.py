"""Opens a data file, plain or compressed, and refuses a file that cannot hold rows.

The compression is recognised by the first bytes of the file, not by its ending. zstd needs no further package,
because pyarrow has it.
"""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from megatron_paint.base.errors import UserError

HEAD_BYTES = 2**16
PARQUET_MARK = b"PAR1"
FORMATS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".pq": "parquet",
}
COMPRESSION_ENDINGS = (".gz", ".zst", ".bz2", ".xz")
DECOMPRESSION_ERRORS = (EOFError, zlib.error, lzma.LZMAError)  # besides OSError without errno


def _open_zstd(path: Path) -> BinaryIO:
    import pyarrow as pa

    return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"), HEAD_BYTES)


_OPENERS: dict[bytes, Callable[[Path], BinaryIO]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
    b"\x28\xb5\x2f\xfd": _open_zstd,
    b"\x50\x2a\x4d\x18": _open_zstd,  # pzstd begins with a frame that is skipped
}

# First bytes of files that cannot hold rows of text: what the file is, and the fix. {section} is data or evaluation.
_OTHER_FILES = {
    b"version https://git-lfs": "is a Git LFS pointer, not the data: run `git lfs pull` in its folder",
    PARQUET_MARK: "is a Parquet file: set {section}.format: parquet, or rename it to end in .parquet",
    b"ARROW1": "is an Arrow file: name the folder that `save_to_disk` wrote, and set {section}.format: datasets",
    b"PK\x03\x04": "is a ZIP archive or a spreadsheet: unpack it, or export it as CSV",
    b"PK\x05\x06": "is an empty ZIP archive",
    b"%PDF": "is a PDF file: write the problems as JSON lines",
    b"\xff\xfe\x00\x00": "is UTF-32: convert it with `iconv -f UTF-32 -t UTF-8 FILE > NEW`",
    b"\xff\xfe": "is UTF-16: convert it with `iconv -f UTF-16 -t UTF-8 FILE > NEW`",
    b"\xfe\xff": "is UTF-16: convert it with `iconv -f UTF-16 -t UTF-8 FILE > NEW`",
}
_WEB_PAGES = (b"<!doctype", b"<html", b"<?xml")
_TAR_MARK = slice(257, 262)


def format_of_ending(path: Path) -> str | None:
    """Returns the format that the ending of a file stands for; None for an unknown ending."""
    return FORMATS.get((path.with_suffix("") if path.suffix in COMPRESSION_ENDINGS else path).suffix.lower())


def stem_of(path: Path) -> str:
    """Returns the name of a data file without its ending and without that of its compression."""
    name = path.with_suffix("").name if path.suffix in COMPRESSION_ENDINGS else path.name
    return Path(name).stem


def open_data(path: Path) -> BinaryIO:
    """Opens a file for reading and unpacks gzip, zstd, bzip2 and xz. Raises OSError."""
    with path.open("rb") as file:
        first = file.read(8)
    for mark, opener in _OPENERS.items():
        if first.startswith(mark):
            return opener(path)
    return path.open("rb")


def read_head(path: Path) -> bytes:
    """Returns the first 64 KiB of a file, unpacked. Raises OSError and DECOMPRESSION_ERRORS."""
    with open_data(path) as file:
        return file.read(HEAD_BYTES)


def check_content(path: Path, *, setting: str, parquet: bool = False) -> None:
    """Raises UserError with the fix if the beginning of a file shows that it holds no rows of its format.

    parquet: the file must be Parquet; otherwise it must be text in UTF-8.
    """
    head = read_head(path)
    if not head:
        raise UserError(f"{setting}: {path} has no rows: it is empty")
    if parquet and head.startswith(PARQUET_MARK):
        return
    section = setting.partition(".")[0]
    fix = _other_content(head)
    if fix:
        raise UserError(f"{setting}: {path} {fix.format(section=section)}")
    if parquet:
        raise UserError(
            f"{setting}: {path}: not a readable Parquet file: it does not begin with {PARQUET_MARK.decode()}; name the "
            f"right file, or set {section}.format to its format"
        )


def _other_content(head: bytes) -> str:
    """Returns what a file is that holds no rows of text, and the fix; an empty text if it may hold rows."""
    for mark, fix in _OTHER_FILES.items():
        if head.startswith(mark):
            return fix
    if head.lstrip().lower().startswith(_WEB_PAGES):
        return "is a web page: download the file itself (on the Hugging Face hub: /resolve/ in place of /blob/)"
    if head[_TAR_MARK] == b"ustar":
        return "is a tar archive: unpack it, and name a file in it"
    if b"\x00" in head[:4]:
        return "is UTF-16 without a byte order mark: convert it with `iconv -f UTF-16LE -t UTF-8 FILE > NEW`"
    if b"\x00" in head:
        return "is a binary file: it has bytes of value 0; convert it to JSON lines"
    return ""
