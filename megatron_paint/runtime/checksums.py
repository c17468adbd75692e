"""Checksums of a folder's files, by which what was written is told from what is there."""

import hashlib
import json
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypedDict, TypeVar

from megatron_paint.base.errors import UserError

CHECKSUMS = "checksums.json"
AGAIN_AFTER = (1.0, 5.0, 20.0)  # seconds; ours

T = TypeVar("T")


class Damaged(Exception):
    """A file that is not what was written."""


class Checksum(TypedDict):
    """Of one file."""

    bytes: int
    sha256: str


def checksums_of(files: Iterable[Path]) -> dict[str, Checksum]:
    """Size and SHA-256 of files, by name."""
    return {file.name: Checksum(bytes=file.stat().st_size, sha256=_sha256(file)) for file in files}


def write_checksums(folder: Path, checksums: Mapping[str, Checksum]) -> None:
    """Puts a folder's checksums into it."""
    text = json.dumps({name: checksums[name] for name in sorted(checksums)}, indent=1)
    (folder / CHECKSUMS).write_text(text + "\n", encoding="utf-8")


def read_checksums(folder: Path) -> dict[str, Checksum] | None:
    """What `write_checksums` wrote; None where it has not. Damaged: it holds something else. UserError: the disk."""
    file = folder / CHECKSUMS
    try:
        found = json.loads(_patiently(Path.read_text, file))
        return {name: Checksum(bytes=entry["bytes"], sha256=entry["sha256"]) for name, entry in found.items()}
    except FileNotFoundError:
        return None
    except OSError as error:
        raise unreadable(file, error) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{CHECKSUMS} is not what was written ({error!r})") from error


def damage(folder: Path, checksums: Mapping[str, Checksum]) -> str | None:
    """What is wrong with the first of these files that is not as it was written; None where all are.

    UserError: a file is there and the disk does not give it, which says nothing about what is in it.
    """
    for name, wanted in checksums.items():
        file = folder / name
        try:
            size = _patiently(Path.stat, file).st_size
            if size != wanted["bytes"]:
                return f"{name} has {size:,} bytes, not {wanted['bytes']:,}"
            if _patiently(_sha256, file) != wanted["sha256"]:
                return f"{name} is not what was written: its SHA-256 is another"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            raise unreadable(file, error) from error
    return None


def _patiently(read: Callable[[Path], T], file: Path) -> T:
    """Reads again where a disk fails, as a shared one may for a moment."""
    for seconds in AGAIN_AFTER:
        try:
            return read(file)
        except FileNotFoundError:
            raise
        except OSError:
            time.sleep(seconds)
    return read(file)


def unreadable(file: Path, error: OSError) -> UserError:
    """What to raise where the disk does not give a file."""
    return UserError(
        f"{file} cannot be read by {socket.gethostname()}: {error.strerror or error}. Nothing was changed; start again "
        "when the disk is well, or move the folder away to go on without it"
    )


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
