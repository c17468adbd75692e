"""Checks that the settings can be read on this node and that the disk has space for the next checkpoint."""

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_paint.base.counts import count_text
from megatron_paint.base.errors import UserError
from megatron_paint.launch.preflight.result import CheckResult

SETTINGS, SPACE = "settings", "space"
COPIES = 2  # the old checkpoint stays until the new one is complete
FILES_OF_A_RANK = 2  # at most: 13 files from 4 ranks, 6 from one
FILES_BESIDE_RANKS = 8  # metadata, common state, run_state.json, complete, the folder and its unfinished name
GB = 1e9


def check_space(
    run: Path, settings: Path, overrides: Sequence[str], *, ranks: int, statvfs: Callable[[str], os.statvfs_result]
) -> list[CheckResult]:
    """Results for the settings and, if they can be read, for the disk of the run folder.

    ranks: processes that will write a checkpoint.
    """
    from megatron_paint.config.load import load_settings
    from megatron_paint.models.qwen3.shape import read_shape
    from megatron_paint.planning.local_model import with_local_model
    from megatron_paint.planning.memory import checkpoint_bytes

    try:
        read = with_local_model(load_settings(settings, overrides))
        shape = read_shape(read.model.hf_path)
    except UserError as error:
        advice = "if other nodes can read it, mount its file system here"
        return [CheckResult(check=SETTINGS, ok=False, seen=" ".join(str(error).split()), advice=advice, fault="odd")]
    needed = COPIES * checkpoint_bytes(read, shape)
    files = COPIES * (FILES_OF_A_RANK * ranks + FILES_BESIDE_RANKS)
    return [CheckResult(check=SETTINGS, ok=True, seen=str(settings)), room(run, needed, files, statvfs)]


def room(run: Path, needed: int, files: int, statvfs: Callable[[str], os.statvfs_result]) -> CheckResult:
    """Compares free bytes and free inodes of the run folder's disk with the need. Some file systems count no inodes."""
    folder = next(folder for folder in (run.absolute(), *run.absolute().parents) if folder.exists())
    disk = statvfs(str(folder))
    free = disk.f_bavail * disk.f_frsize
    wanted = f"two checkpoints need about {_gb(needed, math.ceil)} and {files} files"
    advice = "free space there, or give another run.dir"
    if free < needed:
        seen = f"{_gb(free, math.floor)} free at {folder}, but {wanted}"
        return CheckResult(check=SPACE, ok=False, seen=seen, advice=advice, fault="job")
    if disk.f_files and disk.f_favail < files:
        seen = f"{count_text(disk.f_favail, 'inode')} free at {folder}, but {wanted}"
        return CheckResult(check=SPACE, ok=False, seen=seen, advice=advice, fault="job")
    return CheckResult(check=SPACE, ok=True, seen=f"{_gb(free, math.floor)} free at {folder}; {wanted}")


def _gb(count: int, towards: Callable[[float], int]) -> str:
    """In GB with one decimal. The direction of rounding never makes a shortage look like enough."""
    return f"{towards(count / GB * 10) / 10:.1f} GB"
