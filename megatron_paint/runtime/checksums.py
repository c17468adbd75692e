"""Checksums of a folder's files. They show whether the files on disk are still the files that were written."""

import hashlib
import json
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypedDict, TypeVar

from megatron_paint.base.errors import UserError

CHECKSUMS = "checksums.json"
RETRY_SECONDS = (1.0, 5.0, 20.0)  # waiting times after failed reads; ours

T = TypeVar("T")


class Damaged(Exception):
    """A file differs from what was written."""


class Checksum(TypedDict):
    """Size and SHA-256 of one file."""

    bytes: int
    sha256: str


def checksums_of(files: Iterable[Path]) -> dict[str, Checksum]:
    """Returns size and SHA-256 of each file, by file name."""
    return {file.name: Checksum(bytes=file.stat().st_size, sha256=_sha256(file)) for file in files}


def write_checksums(folder: Path, checksums: Mapping[str, Checksum]) -> None:
    """Writes the checksums of a folder's files into the folder."""
    text = json.dumps({name: checksums[name] for name in sorted(checksums)}, indent=1)
    (folder / CHECKSUMS).write_text(text + "\n", encoding="utf-8")


def read_checksums(folder: Path) -> dict[str, Checksum] | None:
    """Returns what `write_checksums` wrote, or None if the folder has no checksums.

    Raises Damaged if the file holds something else, and UserError if the disk cannot read it.
    """
    file = folder / CHECKSUMS
    try:
        found = json.loads(_with_retries(Path.read_text, file))
        return {name: Checksum(bytes=entry["bytes"], sha256=entry["sha256"]) for name, entry in found.items()}
    except FileNotFoundError:
        return None
    except OSError as error:
        raise unreadable(file, error) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{CHECKSUMS} differs from what was written ({error!r})") from error


def damage(folder: Path, checksums: Mapping[str, Checksum]) -> str | None:
    """Describes the damage of the first file that differs from what was written; None if all files are intact.

    Raises UserError if a file exists and the disk cannot read it. Its content may still be intact then.
    """
    for name, wanted in checksums.items():
        file = folder / name
        try:
            size = _with_retries(Path.stat, file).st_size
            if size != wanted["bytes"]:
                return f"{name} has {size:,} bytes, not {wanted['bytes']:,}"
            if _with_retries(_sha256, file) != wanted["sha256"]:
                return f"{name} differs from what was written: its SHA-256 is different"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            raise unreadable(file, error) from error
    return None


def _with_retries(read: Callable[[Path], T], file: Path) -> T:
    """Reads a file, and reads it again after an error. A shared disk may fail for a moment."""
    for seconds in RETRY_SECONDS:
        try:
            return read(file)
        except FileNotFoundError:
            raise
        except OSError:
            time.sleep(seconds)
    return read(file)


def unreadable(file: Path, error: OSError) -> UserError:
    """Returns the error to raise when the disk cannot read a file."""
    return UserError(
        f"{file} cannot be read by {socket.gethostname()}: {error.strerror or error}. Nothing was changed. Start again "
        "when the disk works, or move the folder away to continue without it"
    )


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
