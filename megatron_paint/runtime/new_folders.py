"""Folders that are created and, if nothing comes into them, removed again."""

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from megatron_paint.runtime.files import disk_errors


def make_folders(folder: Path) -> list[Path]:
    """Creates a folder and those above it. Returns the new ones, the innermost first."""
    missing = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def remove_empty(folders: Sequence[Path]) -> None:
    """Removes these folders up to the first one that is not empty."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def check_writable(folder: Path) -> None:
    """Writes a file into a folder, which need not exist, and removes it and all new folders again.

    Only trying shows what permissions, quotas and read-only servers allow. UserError: the disk refuses.
    """
    made: list[Path] = []
    with disk_errors(folder):
        try:
            made = make_folders(folder)
            probe = folder / f".probe.{os.getpid()}.unfinished"
            try:
                probe.write_text("x")
            finally:
                probe.unlink(missing_ok=True)
        finally:
            remove_empty(made)
