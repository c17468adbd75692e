"""Writes Megatron's distributed checkpoint format in two parts: a copy that training waits for, and the write.

If one rank cannot write, all ranks stop. With Megatron's own writer, the other ranks stay in a collective if rank 0
cannot write one of its small files. Megatron's own code reads the format.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import core
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from megatron_paint.base.errors import UserError
from megatron_paint.mcore.collectives import all_ranks_do, rank_zero_does
from megatron_paint.mcore.ranks import Ranks
from megatron_paint.runtime.files import disk_errors
from megatron_paint.runtime.work import Work, work


def copy_distributed(state: dict[str, Any], folder: Path, ranks: Ranks, *, named: Path) -> Callable[[Ranks], None]:
    """Copies this rank's part of `state` to host memory; all ranks call together.

    The returned function writes the copy into the empty `folder`, on all ranks together; it communicates over the host
    group of the ranks that it is called with. Rank 0 writes the small part without tensors immediately.
    named: the folder that a UserError names. UserError, from either: writing failed on this rank or on another.
    """
    strategy = _CopyStrategy(ranks, named=named)
    try:
        with disk_errors(named):
            dist_checkpointing.save(state, str(folder), sharded_strategy=strategy, async_sharded_save=True)
    except UserError as error:
        if not strategy.begun:  # the other ranks wait where the strategy begins
            all_ranks_do(ranks, _raiser(error))
        raise
    return strategy.copy.write


def _raiser(error: Exception) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


class _CopyStrategy(TorchDistSaveShardedStrategy):
    """Replaces Megatron's writer: the ranks agree on who writes what, and each copies its part."""

    def __init__(self, ranks: Ranks, *, named: Path) -> None:
        super().__init__("torch_dist", 1)
        self.ranks, self.named = ranks, named
        self.begun = False
        self.copy: _Copy | None = None

    def async_save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | Path, *_: Any) -> AsyncRequest:
        """Megatron calls this on all ranks after rank 0 has written its common part."""
        self.begun = True
        all_ranks_do(self.ranks, lambda: None)
        state, *_ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, self.keep_only_main_replica)
        state = mcore_to_pyt_state_dict(state, False)
        self.copy = _Copy(state, Path(checkpoint_dir), self.ranks, named=self.named)
        return AsyncRequest(None, (), [])


class _Copy:
    """This rank's part in host memory, with torch's own plan for the write, which runs later."""

    def __init__(self, state: dict[str, Any], folder: Path, ranks: Ranks, *, named: Path) -> None:
        self.folder, self.named = folder, named
        # No copies ahead, which are for tensors on a GPU: the writing thread must not use CUDA.
        self.writer = FileSystemWriter(folder, per_thread_copy_ahead=0)
        planner, first = MCoreSavePlanner(flatten_state_dict=False), ranks.rank == 0
        planner.set_up_planner(state, self.writer.storage_meta(), first)
        self.writer.set_up_storage_writer(first)
        plans = _gathered(self.writer.prepare_local_plan(planner.create_local_plan()), ranks)
        if first:
            plans, self.metadata = planner.create_global_plan(plans)
            plans = self.writer.prepare_global_plan(plans)
        mine: list[SavePlan | None] = [None]
        dist.scatter_object_list(mine, plans, src=0, group=ranks.host_group)
        self.plan = planner.finish_plan(mine[0])
        self.written: Work | None = None
        self.data = {item.index: _in_host_memory(planner.resolve_data(item)) for item in self.plan.items}

    def resolve_data(self, item: WriteItem) -> Any:
        """The data of one item; torch's writer calls this."""
        data = self.data[item.index]
        if self.written is not None:
            self.written.advance(_nbytes(data))
        return data

    def write(self, ranks: Ranks) -> None:
        """Writes every rank's tensors, then rank 0's two files that make them a checkpoint."""
        written: list[list[WriteResult]] = []
        all_ranks_do(ranks, lambda: written.append(self._write_mine()))
        everyones = _gathered(written[0], ranks)
        rank_zero_does(ranks, lambda: self._finish(everyones))

    def _write_mine(self) -> list[WriteResult]:
        total = sum(map(_nbytes, self.data.values()))
        saving = work("saving", total=total, unit="bytes", in_background=True)
        with disk_errors(self.named), saving as self.written:
            return self.writer.write_data(self.plan, self).wait()

    def _finish(self, results: list[list[WriteResult]]) -> None:
        with disk_errors(self.named):
            self.writer.finish(self.metadata, results)
            core.save_config(core.CheckpointingConfig("torch_dist", 1), str(self.folder))


def _gathered(mine: Any, ranks: Ranks) -> list | None:
    """The values of all ranks, by rank, on rank 0; None on the others."""
    everyones = [None] * ranks.size if ranks.rank == 0 else None
    dist.gather_object(mine, everyones, dst=0, group=ranks.host_group)
    return everyones


def _in_host_memory(data: Any) -> Any:
    return data.detach().to("cpu", copy=True) if isinstance(data, torch.Tensor) else data


def _nbytes(data: Any) -> int:
    return data.nbytes if isinstance(data, torch.Tensor) else 0
