"""Files and folders that are whole or absent, and one clear error when the disk refuses."""

import contextlib
import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_paint.base.errors import UserError

COMPLETE = "complete"  # marker in a checkpoint's folder, written last
ADVICE = {
    errno.ENOSPC: "free space there, or write to another disk",
    errno.EDQUOT: "the quota is used up: free space there, or write to another disk",
    errno.EFBIG: "files may not grow that large: raise the limit (ulimit -f), or write to another disk",
    errno.EROFS: "it is read-only: choose a place that can be written",
    errno.EACCES: "it is not yours to write: choose a place that can be written",
    errno.EPERM: "it is not yours to write: choose a place that can be written",
}
OTHER_ADVICE = "check that it is a place that can be written"
# What torch's and safetensors' own writers say where a write fails; only the last one says why.
WRITERS = re.compile(r"PytorchStreamWriter|inline_container|iostream error|I/O error: .*\(os error (\d+)\)")
LEFT_OVER = re.compile(r"\.(?P<name>.+)\.(unfinished|replaced)")


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn any error of a disk into a UserError that names the path and what to do."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if (reason := _reason(error)) is None:
            raise
        raise UserError(f"Cannot write {path}: {reason}") from error


def _reason(error: Exception) -> str | None:
    """What the disk said and what to do; None for what is no error of a disk."""
    if isinstance(error, OSError):
        return f"{error.strerror or error}; {ADVICE.get(error.errno, OTHER_ADVICE)}"
    if (found := WRITERS.search(str(error))) is None:
        return None
    if found[1] is None:
        return f"a write failed ({error}), as it does where the disk is full; {ADVICE[errno.ENOSPC]}"
    return _reason(OSError(int(found[1]), os.strerror(int(found[1]))))


def write_atomically(path: Path, data: str | bytes) -> None:
    """Write a file so that a reader, or a crash at any moment, sees the old file or the whole new one.

    A lone surrogate in a text is written as its escape. UserError: the disk is full, read-only or failing; the old file
    is intact then.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as stream:
                stream.write(_encoded(data))
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        sync(path.parent)


def append_line(path: Path, line: str) -> None:
    """Add one line in a single write and wait until it is on the disk; what a full disk cut short is taken back.

    It begins a line of its own where the last one was cut short, as by a power cut.
    """
    data = _encoded(line) + b"\n"
    with disk_errors(path):
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                data = b"\n" + data
            written = os.write(descriptor, data)
            if written != len(data):
                os.ftruncate(descriptor, size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class NewFolder:
    """A folder in the making, which takes the place of `path` when it is finished.

    A crash or an error at any moment leaves the old folder or the new one, whole. What a crash leaves beside it goes
    with the next attempt, or by `clear_left_overs`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.unfinished = self.path.with_name(f".{self.path.name}.unfinished")
        self._replaced = self.path.with_name(f".{self.path.name}.replaced")

    def begin(self) -> None:
        """Make `unfinished`, an empty folder to fill."""
        with disk_errors(self.path):
            self.discard()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            sync(self.path.parent.parent)
            self.unfinished.mkdir()

    def finish(self, *, mark: bool) -> None:
        """Put what was filled in the place of `path`, once all of it is on the disk.

        mark: write the file `complete` into it, last of all.
        """
        with disk_errors(self.path):
            for entry in (*self.unfinished.rglob("*"), self.unfinished):
                sync(entry)
            if mark:
                (self.unfinished / COMPLETE).touch()
                sync(self.unfinished / COMPLETE)
                sync(self.unfinished)
            if self.path.exists():
                os.replace(self.path, self._replaced)
            os.replace(self.unfinished, self.path)
            sync(self.path.parent)
            shutil.rmtree(self._replaced, ignore_errors=True)

    def discard(self) -> None:
        """Take back what was begun, by this attempt or an earlier one that a crash ended."""
        shutil.rmtree(self.unfinished, ignore_errors=True)
        self.recover()

    def recover(self) -> None:
        """Put back what an attempt that ended between its two renames had moved away; remove what it left."""
        if self._replaced.exists() and not self.path.exists():  # the end came between the two renames
            os.replace(self._replaced, self.path)
        shutil.rmtree(self._replaced, ignore_errors=True)


def clear_left_overs(folder: Path) -> None:
    """Take back what attempts that a crash ended have left in `folder`."""
    with disk_errors(folder):
        for entry in list(folder.iterdir()) if folder.is_dir() else []:
            if (match := LEFT_OVER.fullmatch(entry.name)) is None or _in_use(entry):
                continue
            if entry.is_dir():
                NewFolder(folder / match["name"]).discard()
            else:
                entry.unlink(missing_ok=True)


def lock_of(folder: Path) -> Path:
    """The file that whoever fills an unfinished folder may keep locked, so that nobody clears it away."""
    return folder.with_name(f"{folder.name}.lock")


def _in_use(folder: Path) -> bool:
    try:
        with open(lock_of(folder), "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _encoded(text: str | bytes) -> bytes:
    return text.encode("utf-8", "backslashreplace") if isinstance(text, str) else text
