"""One world that saves and exports again and again while the disk refuses a single rank, at each kind of write."""

import errno
import json
import os
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest import mock

from megatron.core.dist_checkpointing import core
from torch.distributed.checkpoint import FileSystemWriter

import megatron_paint.runtime.files
from megatron_paint.base.errors import UserError
from megatron_paint.config.load import load_settings
from megatron_paint.mcore.hf_checkpoint import export_stage
from megatron_paint.mcore.model import DTYPES
from megatron_paint.mcore.policy import MegatronPolicy
from megatron_paint.mcore.ranks import Ranks, start_ranks, stop_ranks
from megatron_paint.models.qwen3.shape import read_shape


@contextmanager
def no_byte(ranks: Ranks, *, rank: int) -> Iterator[None]:
    """The rank may not write a byte into a file."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if ranks.rank == rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextmanager
def full_at(ranks: Ranks, *, owner: object, name: str) -> Iterator[None]:
    """Rank 0 finds the disk full in this function."""
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with mock.patch.object(owner, name, side_effect=full) if ranks.rank == 0 else mock.MagicMock():
        yield


def in_small_shards(policy: MegatronPolicy, folder: Path) -> None:
    """An export in which ranks gather tensors between one file and the next."""
    export_stage(
        policy.stage,
        folder,
        shape=policy.shape,
        ranks=policy.ranks,
        dtype=DTYPES[policy.settings.model.dtype],
        source=policy.settings.model.hf_path,
        shard_bytes=4096,
    )


def contents(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def main() -> None:
    """Prints one JSON object: the UserError that this rank met in each case, null for none, and whether it found there
    what had been there before, and nothing else."""
    settings, checkpoint, out = load_settings(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    ranks = start_ranks(settings.megatron)
    policy = MegatronPolicy(settings, read_shape(settings.model.hf_path), ranks)
    policy.load(checkpoint)

    def save() -> None:
        policy.save(out / "checkpoint", {"step": 1})
        policy.finish_save(wait=True)

    export = partial(policy.export, out / "export")
    save()
    export()
    cases: dict[str, tuple[Callable[[], None], Callable]] = {
        "first file of rank 0": (save, partial(no_byte, rank=0)),
        "tensors of rank 1": (save, partial(no_byte, rank=1)),
        "metadata of the tensors": (save, partial(full_at, owner=FileSystemWriter, name="finish")),
        "metadata of the checkpoint": (save, partial(full_at, owner=core, name="save_config")),
        "flush": (save, partial(full_at, owner=megatron_paint.runtime.files, name="sync")),
        "export": (export, partial(no_byte, rank=0)),
        "first of many shards": (partial(in_small_shards, policy, out / "export"), partial(no_byte, rank=0)),
        "flush of the export": (export, partial(full_at, owner=megatron_paint.runtime.files, name="sync")),
        "nothing": (save, partial(no_byte, rank=-1)),
    }
    before, messages, intact = contents(out), {}, {}
    for case, (act, refusal) in cases.items():
        messages[case] = None
        with refusal(ranks):
            try:
                act()
            except UserError as error:
                messages[case] = str(error)
        intact[case] = ranks.rank != 0 or messages[case] is None or contents(out) == before
    print(json.dumps({"messages": messages, "intact": intact}))
    stop_ranks()
