"""Temporary folders of clusters, and what a killed test run left of its own."""

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

PREFIX = "slurm-cluster-"


class OwnedFolder:
    """A temporary folder that is held by a lock, so that others can tell a living owner from a dead one."""

    def __init__(self) -> None:
        remove_leftovers()
        self._lock: int | None = None
        while self._lock is None or not self.path.exists():  # one that starts beside us may take it for a leftover
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
    """A descriptor that holds the folder's lock; None where somebody else does, or where the folder has gone."""
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
