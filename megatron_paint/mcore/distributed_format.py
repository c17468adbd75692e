"""Writes Megatron's distributed checkpoint format such that a disk that refuses one rank ends all ranks.

Megatron's own writer leaves the other ranks in a collective where rank 0 cannot write one of its small files.
"""

from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as torch_checkpoint
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)

from megatron_paint.disk import disk_errors
from megatron_paint.errors import UserError
from megatron_paint.mcore.agree import all_ranks_do
from megatron_paint.mcore.world import World


class _AgreedStrategy(TorchDistSaveShardedStrategy):
    """Writes all ranks' tensors through torch's own writer, whose errors reach every rank."""

    def __init__(self, world: World) -> None:
        super().__init__("torch_dist", 1)
        self.world = world
        self.begun = self.done = False

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | Path) -> None:
        """Called by Megatron on all ranks between the files that rank 0 writes alone."""
        self.begun = True
        all_ranks_do(self.world, lambda: None)
        state, *_ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, self.keep_only_main_replica)
        torch_checkpoint.save(
            mcore_to_pyt_state_dict(state, False),
            storage_writer=torch_checkpoint.FileSystemWriter(checkpoint_dir),
            planner=MCoreSavePlanner(flatten_state_dict=False),
            process_group=self.world.host_group,
        )
        self.done = True


def save_distributed(state: dict[str, Any], folder: Path, world: World, *, named: Path) -> None:
    """Writes `state` into the empty `folder`; all ranks call together and all come back.

    named: the folder that a UserError names. UserError: a disk refused, on this rank or on another.
    """
    strategy = _AgreedStrategy(world)
    try:
        with disk_errors(named):
            _save(state, folder, strategy)
    except UserError as error:
        message = str(error)
        if not strategy.begun:  # the others wait at the strategy's beginning

            def fail() -> None:
                raise UserError(message)

            all_ranks_do(world, fail)
        if strategy.done:  # the others wait at Megatron's last barrier
            dist.barrier()
        raise


def _save(state: dict[str, Any], folder: Path, strategy: _AgreedStrategy) -> None:
    try:
        dist_checkpointing.save(state, str(folder), sharded_strategy=strategy)
    except torch_checkpoint.CheckpointException as failure:
        error, _ = next(iter(failure.failures.values()))
        raise error from failure
