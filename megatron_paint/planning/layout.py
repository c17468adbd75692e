"""The layout of the processes: checks model, settings and machine against each other before anything is loaded."""

import math
from dataclasses import dataclass
from pathlib import Path

from megatron_paint.base.errors import UserError, about
from megatron_paint.config.profile import ProfileSettings
from megatron_paint.config.settings import MegatronSettings, ModelSettings, RolloutSettings
from megatron_paint.models.qwen3.shape import read_shape
from megatron_paint.models.shape import ModelShape
from megatron_paint.planning.apex import refuse_foreign_apex
from megatron_paint.planning.hardware import engine_environment, use_transformer_engine

WIDTHS = {"bfloat16": 2, "float32": 4}  # bytes of a number


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A model and the processes that share it."""

    shape: ModelShape
    processes: int
    tensor_parallel: int
    pipeline_parallel: int
    data_parallel: int
    uses_engine: bool  # layers of Transformer Engine


def check_layout(
    model: ModelSettings, megatron: MegatronSettings, rollout: RolloutSettings, *, processes: int
) -> Layout:
    """The layout of `processes` processes. UserError names a setting that does not fit, and the nearest valid value."""
    shape = check_model(model, megatron, rollout)
    data_parallel_size(processes, megatron)
    engine_environment(megatron)
    return layout_of(shape, megatron, processes=processes, uses_engine=use_transformer_engine(megatron))


def layout_of(shape: ModelShape, megatron: MegatronSettings, *, processes: int, uses_engine: bool) -> Layout:
    """The layout of settings that fit the model. UserError: it does not fit the number of processes."""
    return Layout(
        shape=shape,
        processes=processes,
        tensor_parallel=megatron.tensor_model_parallel_size,
        pipeline_parallel=megatron.pipeline_model_parallel_size,
        data_parallel=data_parallel_size(processes, megatron),
        uses_engine=uses_engine,
    )


def check_profiled_ranks(profile: ProfileSettings | None, *, processes: int) -> None:
    """Raises UserError if `run.profile.ranks` names a rank that the run does not have."""
    if profile is not None and (beyond := [rank for rank in profile.ranks if rank >= processes]):
        there = "1 rank: choose rank 0" if processes == 1 else f"{processes} ranks: choose from 0 to {processes - 1}"
        raise UserError(f"run.profile.ranks has rank {min(beyond)}, but the run has {there}")


def check_model(model: ModelSettings, megatron: MegatronSettings, rollout: RolloutSettings) -> ModelShape:
    """The sizes of the model, which fit the parallel sizes and the key-value cache. UserError as in `check_layout`.

    It needs neither torch nor the number of processes.
    """
    refuse_foreign_apex()
    with about("model.hf_path"):
        shape = read_shape(model.hf_path)
    check_shape(shape, model, megatron, rollout)
    return shape


def check_shape(shape: ModelShape, model: ModelSettings, megatron: MegatronSettings, rollout: RolloutSettings) -> None:
    """What `check_model` checks once it has read the sizes of the model. UserError as in `check_layout`."""
    _refuse_experts(megatron, shape)
    tp, pp = megatron.tensor_model_parallel_size, megatron.pipeline_model_parallel_size
    for size, what in (
        (shape.num_heads, "attention heads"),
        (shape.num_groups, "key-value groups"),
        (shape.ffn_size, "feed-forward size"),
    ):
        together = math.gcd(size, common_tensor_parallel_size(shape))
        _must_divide("megatron.tensor_model_parallel_size", tp, size, what, shape, together=together)
    layers = shape.num_layers
    _must_divide("megatron.pipeline_model_parallel_size", pp, layers, "number of layers", shape, together=layers)
    if megatron.sequence_parallel and tp == 1:
        raise UserError(
            "megatron.sequence_parallel=true splits activations over tensor-parallel ranks, but "
            "tensor_model_parallel_size=1; set it to false"
        )
    _check_cache(shape, model=model, megatron=megatron, rollout=rollout)
    start = model.megatron_path
    if start is not None and not Path(start).is_dir():
        raise UserError(f"model.megatron_path: {start} is not a folder; give the folder of a Megatron checkpoint")


def data_parallel_size(processes: int, megatron: MegatronSettings) -> int:
    """The number of replicas that `processes` processes form. UserError: the layout does not fit that number."""
    tp, pp = megatron.tensor_model_parallel_size, megatron.pipeline_model_parallel_size
    if processes % (tp * pp):
        multiple = max(1, round(processes / (tp * pp))) * tp * pp
        raise UserError(
            f"{processes} processes cannot be laid out as tensor_model_parallel_size={tp} x "
            f"pipeline_model_parallel_size={pp}: their number must be a multiple of {tp * pp} "
            f"(nearest: --processes {multiple})"
        )
    return processes // (tp * pp)


def cache_bytes_per_token(shape: ModelShape, *, dtype: str, megatron: MegatronSettings) -> int:
    """Bytes of the keys and values of one token that a rank stores while it samples."""
    layers = shape.num_layers // megatron.pipeline_model_parallel_size
    return layers * 2 * shape.num_groups // megatron.tensor_model_parallel_size * shape.head_dim * WIDTHS[dtype]


def _refuse_experts(megatron: MegatronSettings, shape: ModelShape) -> None:
    if shape.num_experts:
        raise UserError(
            f"{shape.source} is a mixture of experts: its checkpoints can be converted (megatron-paint convert), but "
            "training one is not possible yet; give a dense model"
        )
    if megatron.expert_model_parallel_size > 1:
        raise UserError(
            f"megatron.expert_model_parallel_size={megatron.expert_model_parallel_size} splits experts over ranks, and "
            f"{shape.source} has none; set it to 1"
        )


def common_tensor_parallel_size(shape: ModelShape) -> int:
    """The largest tensor-parallel size that divides everything that is split over ranks. Its divisors are valid too."""
    return math.gcd(shape.num_heads, shape.num_groups, shape.ffn_size)


def _must_divide(key: str, ranks: int, size: int, what: str, shape: ModelShape, *, together: int) -> None:
    """UserError unless `ranks` divides `size`. It suggests the nearest divisor of `together`, which holds for all."""
    if size % ranks:
        valid = [n for n in range(1, together + 1) if together % n == 0]
        nearest = min(valid, key=lambda n: (abs(n - ranks), n))
        raise UserError(
            f"{key}={ranks} does not divide the {what}, {size}, of {shape.source}; the nearest that fits the model is "
            f"{nearest}"
        )


def _check_cache(
    shape: ModelShape, *, model: ModelSettings, megatron: MegatronSettings, rollout: RolloutSettings
) -> None:
    """UserError where the cache does not hold one response of the greatest possible length."""
    needed = cache_bytes_per_token(shape, dtype=model.dtype, megatron=megatron) * shape.max_positions
    if needed > rollout.cache_bytes and rollout.engine != "vllm":
        raise UserError(
            f"rollout.cache_bytes={rollout.cache_bytes:g} is less than the keys and values of one response of "
            f"{shape.max_positions:,} positions take on a rank: {needed:,}; raise it, or the tensor or pipeline "
            "parallel size"
        )
