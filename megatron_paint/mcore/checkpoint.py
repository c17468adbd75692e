"""Checkpoints of a run: Megatron's distributed format plus the run's own state; complete or absent.

Saved at one layout, loaded at any other: weights and optimiser state are stored by parameter, not by rank.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.optimizer import MegatronOptimizer

from megatron_paint.errors import UserError
from megatron_paint.mcore.model import Qwen3Model
from megatron_paint.mcore.teacher import Teacher
from megatron_paint.mcore.world import World

STATE = "run_state.json"
COMPLETE = "complete"  # written last: a folder without it is not a checkpoint

# The one sharding of Megatron's distributed optimiser that any layout can load.
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def save_checkpoint(
    folder: Path, stage: Qwen3Model, optimizer: MegatronOptimizer, teacher: Teacher, state: dict[str, Any], world: World
) -> None:
    """Writes everything a run needs to go on; all ranks call together. A failed write leaves nothing that looks whole."""
    folder = Path(folder)
    partial = folder.with_name(f"{folder.name}.partial")
    if world.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier(group=world.host_group)
    dist_checkpointing.save(_sharded_state(stage, optimizer, teacher, is_loading=False), str(partial))
    dist.barrier(group=world.host_group)
    if world.rank == 0:
        (partial / STATE).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
        _flush(partial)
        (partial / COMPLETE).touch()
        _flush(partial)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    dist.barrier(group=world.host_group)


def load_checkpoint(
    folder: Path, stage: Qwen3Model, optimizer: MegatronOptimizer, teacher: Teacher
) -> dict[str, Any]:
    """Fills model, optimiser and teacher from `folder`, whatever layout wrote it; returns the run's state."""
    wanted = _sharded_state(stage, optimizer, teacher, is_loading=True)
    loaded = _load(wanted, folder)
    stage.load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])
    teacher.load(loaded)
    return json.loads((Path(folder) / STATE).read_text(encoding="utf-8"))


def load_weights(stage: Qwen3Model, folder: str | Path) -> None:
    """Fills the model alone from a Megatron checkpoint of the same architecture, of any run and layout."""
    stage.load_state_dict(_load({"model": stage.sharded_state_dict()}, folder)["model"])


def _sharded_state(stage: Qwen3Model, optimizer: MegatronOptimizer, teacher: Teacher, *, is_loading: bool) -> dict:
    model = stage.sharded_state_dict(metadata=_METADATA)
    state = {"model": model}
    state["optimizer"] = optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=_METADATA)
    return state | teacher.sharded_state_dict(model)


def _load(wanted: dict, folder: str | Path) -> dict:
    try:
        return dist_checkpointing.load(wanted, str(folder), strict=StrictHandling.RAISE_ALL)
    except (dist_checkpointing.core.CheckpointingException, KeyError, RuntimeError, OSError, EOFError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise UserError(f"checkpoint {folder} cannot be loaded into this model: {first_line}") from error


def _flush(folder: Path) -> None:
    """Brings every file of the folder, and the folder itself, onto the disk."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
