"""Checkpoints of a run: Megatron's distributed format plus the run's own state; complete or absent.

A checkpoint can be loaded at any layout: weights and optimiser state are stored by parameter, not by rank.
"""

import json
import pickle
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import merge
from megatron.core.dist_checkpointing.mapping import apply_factory_merges
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from megatron.core.dist_checkpointing.utils import extract_sharded_base, force_all_tensors_to_non_fp8
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.distributed.checkpoint import CheckpointException

from megatron_paint.base.errors import UserError, about
from megatron_paint.checkpoints.megatron_folder import megatron_folder
from megatron_paint.checkpoints.megatron_source import MegatronSource, unreadable_file
from megatron_paint.checkpoints.run_state import RUN_STATE
from megatron_paint.checkpoints.torch_dist import CheckpointReader
from megatron_paint.mcore.collectives import (
    all_ranks_do,
    begin_folder,
    discarded_on_error,
    finish_folder,
    rank_zero_does,
)
from megatron_paint.mcore.distributed_format import copy_distributed
from megatron_paint.mcore.lora import adapters_of
from megatron_paint.mcore.model import Stage
from megatron_paint.mcore.ranks import Ranks
from megatron_paint.mcore.teacher import Teacher
from megatron_paint.models.shape import ModelShape
from megatron_paint.runtime.checksums import (
    CHECKSUMS,
    Checksum,
    Damaged,
    checksums_of,
    damage,
    read_checksums,
    unreadable,
    write_checksums,
)

# The one sharding of Megatron's distributed optimiser that any layout can load. Megatron writes into what it is given.
_METADATA = MappingProxyType(
    {
        "distrib_optim_sharding_type": "fully_reshardable",
        # One rank gathers the other replicas' shards over gloo. Otherwise every rank would hold all of them on its GPU.
        "distrib_optim_fully_reshardable_mem_efficient": True,
        "chained_optim_avoid_prefix": True,
    }
)
ENGINE_STATE = "_extra_state"  # Transformer Engine's own entries, next to the weights


def copy_checkpoint(
    path: Path,
    stage: Stage,
    optimizer: MegatronOptimizer,
    teacher: Teacher,
    state: dict[str, Any],
    ranks: Ranks,
) -> Callable[[Ranks], None]:
    """Copies everything that a run needs to resume to host memory; all ranks call together.

    The returned function writes the copy to `path`, on all ranks together; it communicates over the host group of the
    ranks that it is called with. A failed write leaves nothing at `path`. UserError, from either: writing failed.
    """
    _begin_state(optimizer)
    folder = begin_folder(path, ranks)
    with discarded_on_error(folder, ranks):
        sharded = _sharded_state(stage, optimizer, teacher, is_loading=False)
        write_tensors = copy_distributed(sharded, folder.unfinished, ranks, named=folder.path)
    content = {**state, "model": _sizes(stage), "has_checksums": True}

    def write(background: Ranks) -> None:
        def write_part(unfinished: Path) -> dict[str, Checksum]:
            write_tensors(background)
            # Each rank wrote its tensors to separate files and reads those back.
            return checksums_of(sorted(unfinished.glob(f"__{background.rank}_*.distcp")))

        finish_folder(folder, background, write=write_part, finish=finish, mark=True)

    def finish(unfinished: Path, parts: list[dict[str, Checksum]]) -> None:
        (unfinished / RUN_STATE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        checksums = {name: checksum for part in parts for name, checksum in part.items()}
        rest = [file for file in sorted(unfinished.iterdir()) if file.is_file() and file.name not in checksums]
        write_checksums(unfinished, checksums | checksums_of(rest))

    return write


def checkpoint_damage(folder: Path, ranks: Ranks) -> str | None:
    """How a checkpoint's files differ from their checksums; None: they do not. The ranks share the reading.

    A checkpoint of an earlier version has no checksums and is accepted. UserError: a disk cannot be read.
    """
    checksums, problem = rank_zero_does(ranks, lambda: _known_checksums(folder))
    if problem is not None:
        return problem
    names = sorted(checksums)[ranks.rank :: ranks.size]
    found = all_ranks_do(ranks, lambda: damage(folder, {name: checksums[name] for name in names}))
    return next((what for what in found if what is not None), None)


def _known_checksums(folder: Path) -> tuple[dict[str, Checksum], str | None]:
    """The checksums of a checkpoint, and what is wrong with them, or None."""
    try:
        if (checksums := read_checksums(folder)) is not None:
            return checksums, None
        state = json.loads((folder / RUN_STATE).read_text(encoding="utf-8"))
        return {}, f"{CHECKSUMS} is missing" if state.get("has_checksums") else None
    except Damaged as error:
        return {}, str(error)
    except FileNotFoundError:
        return {}, f"{RUN_STATE} is missing"
    except OSError as error:
        raise unreadable(folder / RUN_STATE, error) from error
    except (ValueError, AttributeError) as error:
        return {}, f"{RUN_STATE} is not what was written ({error!r})"


def load_checkpoint(folder: Path, stage: Stage, optimizer: MegatronOptimizer, teacher: Teacher) -> dict[str, Any]:
    """Fills model, optimiser and teacher from `folder`, written at any layout; returns the run's state."""
    state = _read_state(folder, stage)
    _begin_state(optimizer)
    _prepare_torch_adam(optimizer)
    wanted = _sharded_state(stage, optimizer, teacher, is_loading=True)
    loaded = _load(wanted, folder)
    _fill(stage, loaded["model"])
    if all(isinstance(part.optimizer, torch.optim.Adam) for part in optimizer.chained_optimizers):
        _restore_step_0(loaded["optimizer"])
    inner = optimizer.chained_optimizers[0].optimizer.param_groups[0]
    _set_rates(loaded["optimizer"], {name: inner[name] for name in ("max_lr", "min_lr") if name in inner})
    optimizer.load_state_dict(loaded["optimizer"])
    _separate_torch_adam_steps(optimizer)
    teacher.load(loaded)
    return state


def _sizes(stage: Stage) -> dict[str, Any]:
    """What a checkpoint's model and the model that loads it must share: sizes, named as in config.json, and positions.

    No weight shows the rotary positions.
    """
    config = stage.config
    return {
        "vocab_size": stage.valid_vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_query_groups,
        "head_dim": config.kv_channels,
        "intermediate_size": config.ffn_hidden_size,
        "tie_word_embeddings": stage.tied,
        **(_expert_sizes(config) if config.num_moe_experts else {}),
        **stage.rotary,
    }


def _expert_sizes(config: TransformerConfig) -> dict[str, Any]:
    return {
        "num_experts": config.num_moe_experts,
        "num_experts_per_tok": config.moe_router_topk,
        "moe_intermediate_size": config.moe_ffn_hidden_size,
        "norm_topk_prob": not config.moe_router_pre_softmax,
    }


def _read_state(folder: str | Path, stage: Stage) -> dict[str, Any]:
    """The run's state; UserError where it cannot be read or is of a model of other sizes."""
    file = Path(folder) / RUN_STATE
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        saved = dict(state["model"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"checkpoint {folder} cannot be resumed: {file.name} is not readable ({error!r}). Remove the folder to "
            "resume from the checkpoint before it"
        ) from error
    here = _sizes(stage)
    saved = {**stage.rotary, **saved}  # checkpoints of earlier versions do not have it
    if differences := [f"{key} is {saved.get(key)}, not {here[key]}" for key in here if saved.get(key) != here[key]]:
        raise UserError(
            f"checkpoint {folder} is of another model than model.hf_path: {', '.join(differences)}. Restore the model "
            "that the run was started from, or start a new run in another run.dir"
        )
    return state


def load_weights(stage: Stage, folder: str | Path, shape: ModelShape) -> tuple[str, ...]:
    """Fills only the model, from a Megatron checkpoint of the same architecture, of any program, run and layout.

    Returns what the user should know about the weights. UserError names what does not fit or cannot be read.
    """
    with about("model.megatron_path"):
        folder = megatron_folder(folder)
        if has_adapters(folder) and not adapters_of(stage):
            raise UserError(
                f"{folder} is the checkpoint of a LoRA run, whose adapters would be left out; start from its Hugging "
                "Face export, in which they are merged (model.hf_path)"
            )
        source = MegatronSource(folder, shape)
        wanted = {"model": _weights(stage)}
        with _as_user_error(folder, source.model_keys):
            state = _load_tensors(wanted, folder)
    _fill(stage, state["model"])
    return source.notes


def _load_tensors(wanted: dict, folder: Path) -> dict:
    """Loads the tensors of a checkpoint as Megatron's `load` does, without the common part.

    Other programs keep their objects there, and each version of Megatron in another place.
    """
    force_all_tensors_to_non_fp8(wanted)
    sharded, state, factories = load_preprocess(wanted)
    sharded, _ = extract_sharded_base(sharded)
    merge(state, TorchDistLoadShardedStrategy().load(sharded, folder))
    return apply_factory_merges(state, factories)


def _weights(stage: Stage) -> dict:
    """The model's entries in a checkpoint, by Megatron's keys.

    Only delayed FP8 scaling uses Transformer Engine's own entries. Otherwise they are left out, so that local layers
    and Transformer Engine's layers can load each other's checkpoints.
    """
    state = stage.sharded_state_dict(metadata=dict(_METADATA))
    if stage.config.fp8 is not None and stage.config.fp8_recipe == "delayed":
        return state
    return {key: entry for key, entry in state.items() if not _is_engine_state(key)}


def _is_engine_state(key: str) -> bool:
    """Grouped experts have an entry for each expert, with its number behind the name."""
    return key.rpartition(".")[2].startswith(ENGINE_STATE)


def _fill(stage: Stage, state: dict) -> None:
    missing, unexpected = stage.load_state_dict(state)
    wrong = [key for key in missing if not _is_engine_state(key)] + unexpected
    if wrong:
        raise AssertionError(f"the checkpoint's entries do not fit the model: {wrong[:3]}")


def _begin_state(optimizer: MegatronOptimizer) -> None:
    """Creates the state of an optimiser that has taken no step: Megatron cannot save or load one without state.

    A step on zero gradients at a learning rate of 0 creates it, and is not counted.
    """
    for inner in (part.optimizer for part in optimizer.chained_optimizers):
        if inner.state:
            continue
        kept = [(group["lr"], group.get("step")) for group in inner.param_groups]
        for group in inner.param_groups:
            group["lr"] = 0.0
            for parameter in group["params"]:
                if parameter.numel():  # Transformer Engine's and Apex's Adam refuse an empty shard
                    parameter.grad = torch.zeros_like(parameter)
                    if hasattr(parameter, "decoupled_grad"):  # a precision-aware optimiser reads it in place of grad
                        parameter.decoupled_grad = parameter.grad
        inner.step()
        inner.zero_grad(set_to_none=True)
        for group in inner.param_groups:  # a precision-aware optimiser has dropped only its own
            for parameter in group["params"]:
                parameter.grad = None
        for group, (lr, step) in zip(inner.param_groups, kept, strict=True):
            group["lr"] = lr
            if "step" in group:  # Transformer Engine's and Apex's count
                group["step"] = step or 0
        for state in inner.state.values():
            if "step" in state:
                state["step"].zero_()


def _set_rates(state: dict, rates: dict[str, float]) -> None:
    """Gives the loaded groups of parameters this run's rates: megatron-core 0.19 finds a group by them.

    `run.allow_changes` lets a resumed run change them, and each step sets its own learning rate.
    """
    for key, value in state.items():
        if key == "param_groups":
            for group in value:
                group.update({name: rate for name, rate in rates.items() if name in group})
        elif isinstance(value, dict):
            _set_rates(value, rates)


def _restore_step_0(state: dict) -> None:
    """Adds a step counter of 0 to the loaded state of an optimiser: Megatron does not save a step of 0."""
    for key, value in state.items():
        moments = key == "state" and isinstance(value, dict) and any(isinstance(v, dict) for v in value.values())
        if moments:
            value.setdefault("common_step", torch.tensor(0.0))
        elif isinstance(value, dict):
            _restore_step_0(value)


def has_adapters(folder: str | Path) -> bool:
    """Whether a checkpoint holds LoRA adapters."""
    keys = CheckpointReader(folder).tensors
    return any("_adapters." in key and not key.startswith(("teacher.", "optimizer.")) for key in keys)


def _prepare_torch_adam(optimizer: MegatronOptimizer) -> None:
    """Lets Megatron's distributed optimiser load into torch's own Adam, used without Transformer Engine and Apex.

    Megatron copies the moments and drops the step.
    """
    for part in _distributed_torch_optimizers(optimizer):
        part._set_main_param_and_optimizer_states = partial(_set_with_step, part)


def _separate_torch_adam_steps(optimizer: MegatronOptimizer) -> None:
    """Makes one step counter per parameter: Megatron loads one tensor for all, and each parameter would advance it."""
    for part in _distributed_torch_optimizers(optimizer):
        for state in part.optimizer.state.values():
            state["step"] = state["step"].clone()


def _distributed_torch_optimizers(optimizer: MegatronOptimizer) -> list[DistributedOptimizer]:
    parts = [part for part in optimizer.chained_optimizers if isinstance(part, DistributedOptimizer)]
    return [part for part in parts if type(part.optimizer).__module__.startswith("torch.")]


def _set_with_step(part: DistributedOptimizer, model_param: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
    group, order = part.model_param_group_index_map[model_param]
    state = part.optimizer.state[part.optimizer.param_groups[group]["params"][order]]
    DistributedOptimizer._set_main_param_and_optimizer_states(part, model_param, {"step": state["step"], **tensors})


def _remove_classes(state: dict) -> None:
    """Removes Python classes from the groups of an optimiser's state.

    Groups of Megatron's offloaded optimiser name two. Megatron saves them and cannot load them (0.16.1 and 0.19.2).
    """
    for key, value in state.items():
        if key == "param_groups":
            for group in value:
                for name in [name for name, entry in group.items() if isinstance(entry, type)]:
                    del group[name]
        elif isinstance(value, dict):
            _remove_classes(value)


def _sharded_state(stage: Stage, optimizer: MegatronOptimizer, teacher: Teacher, *, is_loading: bool) -> dict:
    model = _weights(stage)
    state = {"model": model}
    with _offsets_without_padding(optimizer):
        state["optimizer"] = optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=dict(_METADATA))
    _remove_classes(state["optimizer"])
    return state | teacher.sharded_state_dict(model)


@contextmanager
def _offsets_without_padding(optimizer: MegatronOptimizer) -> Iterator[None]:
    """Lets Megatron's distributed optimiser find each parameter's state, while it makes the state of a checkpoint.

    It joins its buckets without the padding between them and then cuts out each parameter at its offset with padding.
    So everything behind a padded bucket would be stored shifted, without an error (0.16.1 and 0.19.2). There are more
    buckets than one with overlap_grad_reduce, and with a tied embedding on several stages. A bucket is padded if its
    size is no multiple of lcm(128, replicas).
    """
    parts = [part for part in optimizer.chained_optimizers if isinstance(part, DistributedOptimizer)]
    kept = [(buffer, buffer.param_index_map) for part in parts for buffer in part.buffers]
    for buffer, index_map in kept:
        buffer.param_index_map = _without_padding(buffer.buckets, index_map)
    try:
        yield
    finally:
        for buffer, index_map in kept:
            buffer.param_index_map = index_map


def _without_padding(buckets: Sequence[Any], index_map: dict[Any, tuple[int, int, int]]) -> dict:
    """The offsets of each parameter in a buffer whose buckets are joined without the padding between them."""
    starts = [0, *accumulate(bucket.numel_unpadded for bucket in buckets)]
    padding = [bucket.offset - start for bucket, start in zip(buckets, starts[:-1], strict=True)]
    return {
        parameter: (start - padding[number], end - padding[number], number)
        for parameter, (start, end, number) in index_map.items()
    }


def _load(wanted: dict, folder: Path) -> dict:
    with _as_user_error(folder):
        return dist_checkpointing.load(wanted, str(folder), strict=StrictHandling.RAISE_ALL)


_UNREADABLE = (dist_checkpointing.core.CheckpointingException, pickle.UnpicklingError, ImportError)
_UNREADABLE += (KeyError, RuntimeError, OSError, EOFError, UnicodeDecodeError, json.JSONDecodeError)


@contextmanager
def _as_user_error(folder: Path, keys: Collection[str] | None = None) -> Iterator[None]:
    """Names the damaged file and the reason; keys: tensors that are read (None: all)."""
    try:
        yield
    except (torch.OutOfMemoryError, torch.distributed.DistError):
        raise  # these are RuntimeErrors too, but the checkpoint is not their cause
    except CheckpointException as error:  # torch's, of all ranks; it derives from BaseException
        rank, (reason, _) = min(error.failures.items())
        raise UserError(
            unreadable_file(folder, keys) or _not_loaded(folder, f"{_line(reason)} (rank {rank})")
        ) from error
    except _UNREADABLE as error:
        raise UserError(unreadable_file(folder, keys) or _not_loaded(folder, _line(error))) from error


def _not_loaded(folder: Path, reason: str) -> str:
    return f"checkpoint {folder} cannot be loaded into this model: {reason}"


def _line(error: BaseException) -> str:
    """The first sentence of an error. torch adds a paragraph of advice to some."""
    lines = str(error).strip().splitlines()
    return lines[0].split(". ")[0] if lines else repr(error)
