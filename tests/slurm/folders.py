"""Temporary folders of clusters, and the removal of folders that killed test runs left."""

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

PREFIX = "slurm-cluster-"


class OwnedFolder:
    """A temporary folder with a lock, which shows to others whether its owner is alive."""

    def __init__(self) -> None:
        remove_leftovers()
        self._lock: int | None = None
        while (
            self._lock is None or not self.path.exists()
        ):  # another test run may start now and remove it as a leftover
            self.path = Path(tempfile.mkdtemp(prefix=PREFIX))
            self._lock = _lock(self.path)

    def remove(self) -> None:
        shutil.rmtree(self.path)
        os.close(self._lock)


def remove_leftovers() -> None:
    """Removes the folders whose owners were killed; their processes died with them."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        if (lock := _lock(folder)) is not None:
            shutil.rmtree(folder, ignore_errors=True)  # another run may be removing it as well
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """A descriptor that holds the folder's lock; None if another process holds it, or if the folder is gone."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor
