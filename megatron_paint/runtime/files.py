"""Files and folders that are complete or absent, and one clear error when writing fails."""

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
    errno.EROFS: "the disk is read-only: choose a place that you can write to",
    errno.EACCES: "you have no permission to write there: choose a place that you can write to",
    errno.EPERM: "you have no permission to write there: choose a place that you can write to",
}
OTHER_ADVICE = "check that you can write there"
# The messages of torch's and safetensors' own writers when a write fails. Only the last one contains the reason.
WRITERS = re.compile(r"PytorchStreamWriter|inline_container|iostream error|I/O error: .*\(os error (\d+)\)")
LEFT_OVER = re.compile(r"\.(?P<name>.+)\.(unfinished|replaced)")


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns every disk error inside the block into a UserError that names the path and what to do."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if (reason := _reason(error)) is None:
            raise
        raise UserError(f"Cannot write {path}: {reason}") from error


def _reason(error: Exception) -> str | None:
    """Describes a disk error and what to do; None for any other error."""
    if isinstance(error, OSError):
        return f"{error.strerror or error}; {ADVICE.get(error.errno, OTHER_ADVICE)}"
    if (found := WRITERS.search(str(error))) is None:
        return None
    if found[1] is None:
        return f"a write failed ({error}), probably because the disk is full; {ADVICE[errno.ENOSPC]}"
    return _reason(OSError(int(found[1]), os.strerror(int(found[1]))))


def write_atomically(path: Path, data: str | bytes) -> None:
    """Writes a file so that a reader sees the old file or the complete new one, even after a crash at any moment.

    A lone surrogate in a text is written as its escape. Raises UserError if the disk is full, read-only or failing. The
    old file is intact then.
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
    """Adds one line in a single write and waits until it is on disk.

    If the last line in the file is incomplete, as after a power cut, the text starts on a new line. Raises UserError if
    writing fails. If the disk is full, the incomplete line is removed first.
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
    """A folder that is filled under another name and replaces `path` when it is finished.

    After a crash or an error at any moment, `path` is the complete old folder or the complete new one. A crash may
    leave other folders beside it. The next attempt or `clear_left_overs` removes them.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.unfinished = self.path.with_name(f".{self.path.name}.unfinished")
        self._replaced = self.path.with_name(f".{self.path.name}.replaced")

    def begin(self) -> None:
        """Creates `unfinished`, an empty folder to fill."""
        with disk_errors(self.path):
            self.discard()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            sync(self.path.parent.parent)
            self.unfinished.mkdir()

    def finish(self, *, mark: bool) -> None:
        """Waits until all files are on disk and then replaces `path` by the filled folder.

        mark: writes the file `complete` into the folder, after all other files.
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
        """Removes the unfinished folder of this attempt, or of an earlier attempt that crashed."""
        shutil.rmtree(self.unfinished, ignore_errors=True)
        self.recover()

    def recover(self) -> None:
        """Moves the old folder back if an attempt ended between its two renames. Removes the rest of that attempt."""
        if self._replaced.exists() and not self.path.exists():  # the attempt ended between the two renames
            os.replace(self._replaced, self.path)
        shutil.rmtree(self._replaced, ignore_errors=True)


def is_left_over(name: str) -> bool:
    """Whether a file or folder has the name of something that a crashed attempt has left."""
    return LEFT_OVER.fullmatch(name) is not None


def clear_left_overs(folder: Path) -> None:
    """Removes from `folder` what crashed attempts have left there. It skips unfinished folders that are locked."""
    with disk_errors(folder):
        for entry in list(folder.iterdir()) if folder.is_dir() else []:
            if (match := LEFT_OVER.fullmatch(entry.name)) is None or _in_use(entry):
                continue
            if entry.is_dir():
                NewFolder(folder / match["name"]).discard()
            else:
                entry.unlink(missing_ok=True)


def lock_of(folder: Path) -> Path:
    """Returns the lock file of an unfinished folder. While a process holds it, `clear_left_overs` skips the folder."""
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
    """Waits until a file, or the list of names in a folder, is safe from a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _encoded(text: str | bytes) -> bytes:
    return text.encode("utf-8", "backslashreplace") if isinstance(text, str) else text
