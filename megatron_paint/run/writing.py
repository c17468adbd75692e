"""Files that are whole or absent, and one clear error when the disk refuses."""

import contextlib
import errno
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_paint.errors import UserError

ADVICE = {
    errno.ENOSPC: "free space there, or set run.dir to another disk",
    errno.EDQUOT: "the quota is used up: free space there, or set run.dir to another disk",
    errno.EROFS: "it is read-only: set run.dir to a place that can be written",
    errno.EACCES: "it is not yours to write: set run.dir to a place that can be written",
    errno.EPERM: "it is not yours to write: set run.dir to a place that can be written",
}


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn any OSError into a UserError that names the path and what to do."""
    try:
        yield
    except OSError as error:
        advice = ADVICE.get(error.errno, "check that run.dir is a folder that can be written")
        raise UserError(f"Cannot write {path}: {error.strerror or error}; {advice}") from error


def write_atomically(path: Path, data: str | bytes) -> None:
    """Write a file so that a reader, or a crash at any moment, sees the old file or the whole new one.

    UserError: the disk is full, read-only or failing; the old file is intact then.
    """
    content = data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        _sync(path.parent)


def append_line(path: Path, line: str) -> None:
    """Add one line in a single write and wait until it is on the disk; what a full disk cut short is taken back."""
    data = line.encode("utf-8", "backslashreplace") + b"\n"
    with disk_errors(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            written = os.write(descriptor, data)
            if written != len(data):
                os.ftruncate(descriptor, size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def folder_atomically(path: Path) -> Iterator[Path]:
    """Give a temporary folder to fill, which takes the place of `path` if the block ends well and else is removed."""
    temporary = path.with_name(f".{path.name}.tmp")
    old = path.with_name(f".{path.name}.old")
    with disk_errors(path):
        for stale in (temporary, old):
            shutil.rmtree(stale, ignore_errors=True)
        temporary.mkdir(parents=True)
    try:
        try:
            yield temporary
        except OSError as error:
            if error.errno not in ADVICE:
                raise
            with disk_errors(path):
                raise
        with disk_errors(path):
            for file in temporary.rglob("*"):
                _sync(file)
            if path.exists():
                os.replace(path, old)
            os.replace(temporary, path)
            _sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Strict JSON: NaN and infinities become null, because JSON has no such numbers and strict readers refuse them.

    A lone surrogate, which JSON can hold and UTF-8 cannot, is written as its escape by the functions above.
    """
    return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, indent=indent)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
