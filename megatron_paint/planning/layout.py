"""The layout of the processes: checks model, settings and machine against each other before anything is loaded."""

import math
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from megatron_paint.base.counts import agreeing, count_text
from megatron_paint.base.errors import UserError, about
from megatron_paint.config.megatron import MegatronSettings
from megatron_paint.config.profile import ProfileSettings
from megatron_paint.config.settings import ModelSettings, RolloutSettings, Settings
from megatron_paint.models.qwen3.shape import read_shape
from megatron_paint.models.shape import ModelShape
from megatron_paint.planning.apex import refuse_foreign_apex
from megatron_paint.planning.hardware import engine_environment, use_transformer_engine
from megatron_paint.planning.stages import LayerSplit, split_layers

WIDTHS = {"bfloat16": 2, "float32": 4}  # bytes of a number


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A model and the processes that share it."""

    shape: ModelShape
    processes: int
    tensor_parallel: int
    pipeline_parallel: int
    data_parallel: int
    split: LayerSplit  # the layers of each stage
    context_parallel: int = 1
    uses_engine: bool  # layers of Transformer Engine
    expert_parallel: int = 1  # parts of each layer's experts
    expert_tensor_parallel: int = 1  # parts of each expert

    @property
    def expert_replicas(self) -> int:
        """Copies of each expert."""
        return self.processes // (self.pipeline_parallel * self.expert_parallel * self.expert_tensor_parallel)


def check_layout(
    model: ModelSettings, megatron: MegatronSettings, rollout: RolloutSettings, *, processes: int, samples: bool = True
) -> Layout:
    """The layout of `processes` processes. UserError names a setting that does not fit, and the nearest valid value.

    samples: whether the ranks sample; only then must rollout.cache_bytes hold a response.
    """
    shape = check_sizes(model, megatron, rollout, processes=processes, samples=samples)
    engine_environment(megatron)
    return layout_of(shape, megatron, processes=processes, uses_engine=use_transformer_engine(megatron))


def check_sizes(
    model: ModelSettings, megatron: MegatronSettings, rollout: RolloutSettings, *, processes: int, samples: bool = True
) -> ModelShape:
    """What `check_layout` checks without a look at this machine. It does not need torch."""
    shape = check_model(model, megatron, rollout, samples=samples)
    data_parallel_size(processes, megatron)
    return shape


def layout_of(shape: ModelShape, megatron: MegatronSettings, *, processes: int, uses_engine: bool) -> Layout:
    """The layout of settings that fit the model. UserError: it does not fit the number of processes."""
    return Layout(
        shape=shape,
        processes=processes,
        tensor_parallel=megatron.tensor_model_parallel_size,
        pipeline_parallel=megatron.pipeline_model_parallel_size,
        data_parallel=data_parallel_size(processes, megatron),
        context_parallel=megatron.context_parallel_size,
        split=split_layers(shape, megatron),
        uses_engine=uses_engine,
        **expert_sizes(shape, megatron),
    )


def expert_sizes(shape: ModelShape, megatron: MegatronSettings) -> dict[str, int]:
    """The parallel sizes of a layout's experts; a dense model has none."""
    if not shape.num_experts:
        return {}
    sharing = megatron.expert_tensor_parallel_size or megatron.tensor_model_parallel_size
    return {"expert_parallel": megatron.expert_model_parallel_size, "expert_tensor_parallel": sharing}


def check_profiled_ranks(profile: ProfileSettings | None, *, processes: int) -> None:
    """Raises UserError if `run.profile.ranks` names a rank that the run does not have."""
    if profile is not None and (beyond := [rank for rank in profile.ranks if rank >= processes]):
        there = "1 rank: choose rank 0" if processes == 1 else f"{processes} ranks: choose from 0 to {processes - 1}"
        raise UserError(f"run.profile.ranks has rank {min(beyond)}, but the run has {there}")


def trainer_samples(settings: Settings) -> bool:
    """Whether a run's ranks sample long responses: rollouts, or the answers of an evaluation."""
    if settings.needs.samples_per_problem and settings.rollout.engine == "megatron":
        return True
    return settings.evaluation.problems is not None


def check_model(
    model: ModelSettings, megatron: MegatronSettings, rollout: RolloutSettings, *, samples: bool = True
) -> ModelShape:
    """The sizes of the model, which fit the parallel sizes and the key-value cache. UserError as in `check_layout`.

    It needs neither torch nor the number of processes.
    """
    refuse_foreign_apex()
    with about("model.hf_path"):
        shape = read_shape(model.hf_path)
    check_shape(shape, model, megatron, rollout, samples=samples)
    return shape


def check_shape(
    shape: ModelShape,
    model: ModelSettings,
    megatron: MegatronSettings,
    rollout: RolloutSettings,
    *,
    samples: bool = True,
) -> None:
    """What `check_model` checks once it has read the sizes of the model. UserError as in `check_layout`."""
    _check_experts(megatron, shape)
    _check_expert_adapters(model, megatron, shape)
    tp = megatron.tensor_model_parallel_size
    for size, what in (
        (shape.num_heads, "attention heads"),
        (shape.num_groups, "key-value groups"),
        *([] if shape.num_experts else [(shape.ffn_size, "feed-forward size")]),
    ):
        together = math.gcd(size, common_tensor_parallel_size(shape))
        _must_divide("megatron.tensor_model_parallel_size", tp, size, what, shape, together=together)
    split = split_layers(shape, megatron)
    _check_empty_stages(split, model, shape)
    _check_recomputed_units(split, megatron, shape)
    _check_offloaded_layers(megatron, shape)
    _check_bf16_layers(megatron, shape)
    if rollout.cuda_graphs and shape.num_experts:
        raise UserError(
            f"rollout.cuda_graphs=true cannot capture a step of a mixture of experts ({shape.source}): the host reads "
            "how many tokens each expert gets. Set it to false"
        )
    if megatron.sequence_parallel and tp == 1:
        raise UserError(
            "megatron.sequence_parallel=true splits activations over tensor-parallel ranks, but "
            "tensor_model_parallel_size=1; set it to false"
        )
    if samples:
        _check_cache(shape, model=model, megatron=megatron, rollout=rollout)
    start = model.megatron_path
    if start is not None and not Path(start).is_dir():
        raise UserError(f"model.megatron_path: {start} is not a folder; give the folder of a Megatron checkpoint")


def _check_empty_stages(split: LayerSplit, model: ModelSettings, shape: ModelShape) -> None:
    """UserError where an optimiser of a stage would have no weight: Megatron's then saves no count of steps.

    Adapters are in layers alone. Experts have an optimiser of their own.
    """
    empty = [stage for stage in range(len(split.layers)) if not split.count(stage)]
    if shape.num_experts and empty:
        raise UserError(
            f"{shape.source} is a mixture of experts, and the settings under megatron give pipeline stage {empty[0]} "
            f"of {len(split.layers)} no layer: give it one"
        )
    if model.lora is not None and empty:
        raise UserError(
            f"model.lora trains only layers, and the settings under megatron give pipeline stage {empty[0]} of "
            f"{len(split.layers)} no layer: give it one, or set model.lora to null"
        )


def _check_recomputed_units(split: LayerSplit, megatron: MegatronSettings, shape: ModelShape) -> None:
    """UserError where a unit of uniform recomputation would go beyond the last layer of a chunk."""
    unit = megatron.recompute_num_layers
    if megatron.recompute_granularity != "full" or megatron.recompute_method != "uniform" or unit is None:
        return
    sizes = sorted({size for stage in range(len(split.layers)) for size in split.sizes(stage)} - {0})
    if any(size % unit for size in sizes):
        what = "chunks of layers" if split.chunks > 1 else "pipeline stages"
        nearest = _nearest_divisor(unit, math.gcd(*sizes))
        raise UserError(
            f"megatron.recompute_num_layers={unit} divides layers into units with recompute_method=uniform, and the "
            f"{what} of {shape.source} have {' and '.join(map(str, sizes))} layers; the nearest that fits is {nearest}"
        )


def _check_offloaded_layers(megatron: MegatronSettings, shape: ModelShape) -> None:
    """UserError where all layers or more would be offloaded, which Megatron refuses."""
    if megatron.cpu_offloading and megatron.cpu_offloading_num_layers >= shape.num_layers:
        raise UserError(
            f"megatron.cpu_offloading_num_layers={megatron.cpu_offloading_num_layers} must be less than the "
            f"{count_text(shape.num_layers, 'layer')} of {shape.source}; the nearest that fits is "
            f"{shape.num_layers - 1}"
        )


def _check_bf16_layers(megatron: MegatronSettings, shape: ModelShape) -> None:
    """UserError where more layers would be kept out of FP8 at one end than a pipeline stage has, on average."""
    if megatron.fp8 is None or megatron.fp8_emulate or not megatron.first_last_layers_bf16:
        return
    most = shape.num_layers // megatron.pipeline_model_parallel_size
    for name in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
        if (count := getattr(megatron, name)) > most:
            raise UserError(
                f"megatron.{name}={count} with first_last_layers_bf16=true must be at most the layers of a pipeline "
                f"stage: {most} of the {shape.num_layers} of {shape.source} with pipeline_model_parallel_size="
                f"{megatron.pipeline_model_parallel_size}; the nearest that fits is {most}"
            )


def data_parallel_size(processes: int, megatron: MegatronSettings) -> int:
    """The number of replicas that `processes` processes form. UserError: the layout does not fit that number."""
    replica = ranks_of_replica(megatron)
    if processes % replica:
        cp = megatron.context_parallel_size
        raise UserError(
            f"{count_text(processes, 'process')} cannot be laid out as tensor_model_parallel_size="
            f"{megatron.tensor_model_parallel_size} x pipeline_model_parallel_size="
            f"{megatron.pipeline_model_parallel_size}{f' x context_parallel_size={cp}' if cp > 1 else ''}: their "
            f"number must be a multiple of {replica} "
            f"(nearest: --processes {max(1, round(processes / replica)) * replica})"
        )
    pp = megatron.pipeline_model_parallel_size
    stage, sharing = processes // pp, megatron.expert_parallel_ranks
    if stage % sharing:
        names = (
            f"expert_model_parallel_size={megatron.expert_model_parallel_size} x {_expert_tensor_parallel(megatron)}"
        )
        multiple = math.lcm(replica // pp, sharing) * pp
        raise UserError(
            f"a pipeline stage of {count_text(stage, 'process')} cannot hold complete sets of experts of "
            f"megatron.{names}: the number of processes must be a multiple of {multiple} (nearest: --processes "
            f"{max(1, round(processes / multiple)) * multiple}), or set one of the two smaller"
        )
    _check_instances(processes, megatron)
    return processes // replica


def _check_instances(processes: int, megatron: MegatronSettings) -> None:
    """UserError: the copies of the weights do not divide into the optimiser's instances."""
    instances, stage = megatron.num_distributed_optimizer_instances, processes // megatron.pipeline_model_parallel_size
    for what, ranks in (
        ("the weights", megatron.tensor_model_parallel_size),
        ("each expert", megatron.expert_parallel_ranks),
    ):
        if (copies := stage // ranks) % instances:
            raise UserError(
                f"megatron.num_distributed_optimizer_instances={instances} does not divide the "
                f"{count_text(copies, 'copy')} of {what} that {count_text(processes, 'process')} "
                f"{agreeing(processes, 'has', 'have')}: set it to {'1' if copies == 1 else 'a divisor of this number'}"
            )


def fewest_processes(megatron: MegatronSettings) -> int:
    """The smallest number of processes that this layout has."""
    replica, pp = ranks_of_replica(megatron), megatron.pipeline_model_parallel_size
    return math.lcm(replica // pp, megatron.expert_parallel_ranks) * pp


def ranks_of_replica(megatron: MegatronSettings) -> int:
    """The processes that compute one micro-batch together."""
    sizes = (megatron.tensor_model_parallel_size, megatron.pipeline_model_parallel_size, megatron.context_parallel_size)
    return math.prod(sizes)


def cache_bytes_per_token(shape: ModelShape, *, dtype: str, megatron: MegatronSettings) -> int:
    """Bytes of the keys and values of one token that a rank of the largest stage stores while it samples."""
    layers = split_layers(shape, megatron).most
    return layers * 2 * shape.num_groups // megatron.tensor_model_parallel_size * shape.head_dim * WIDTHS[dtype]


def _check_experts(megatron: MegatronSettings, shape: ModelShape) -> None:
    """UserError: settings of experts do not fit the mixture, or the model has no experts."""
    ep, etp = megatron.expert_model_parallel_size, megatron.expert_tensor_parallel_size
    if not shape.num_experts:
        for name, given in (("expert_model_parallel_size", ep > 1), ("expert_tensor_parallel_size", etp is not None)):
            if given:
                raise UserError(
                    f"megatron.{name}={getattr(megatron, name)} splits experts over ranks, and {shape.source} has "
                    f"none; leave {name} out"
                )
        if megatron.has_auxiliary_loss:
            name = "moe_aux_loss_coeff" if megatron.moe_aux_loss_coeff else "moe_z_loss_coeff"
            raise UserError(f"megatron.{name} is a loss of routers, and {shape.source} has none; leave {name} out")
        return
    experts = shape.num_experts
    _must_divide("megatron.expert_model_parallel_size", ep, experts, "number of experts", shape, together=experts)
    size = shape.expert_ffn_size
    if etp is None and size % megatron.tensor_model_parallel_size:
        raise UserError(
            f"megatron.expert_tensor_parallel_size is not set, so tensor_model_parallel_size="
            f"{megatron.tensor_model_parallel_size} ranks share each expert, and that does not divide the feed-forward "
            f"size of an expert, {size}, of {shape.source}; set it to 1"
        )
    what = "feed-forward size of an expert"
    _must_divide("megatron.expert_tensor_parallel_size", etp or 1, size, what, shape, together=size)
    if megatron.tensor_model_parallel_size > 1 and not megatron.sequence_parallel:
        raise UserError(
            f"megatron.tensor_model_parallel_size={megatron.tensor_model_parallel_size} needs "
            f"megatron.sequence_parallel=true with a mixture of experts ({shape.source}): every rank would route all "
            "tokens otherwise"
        )


def _check_expert_adapters(model: ModelSettings, megatron: MegatronSettings, shape: ModelShape) -> None:
    """UserError: adapters on experts do not fit the model or the layout."""
    if model.lora is None or not model.lora.experts:
        return
    if not shape.num_experts:
        raise UserError(f"model.lora.experts=true adapts experts, and {shape.source} has none; leave experts out")
    if (sharing := megatron.expert_tensor_parallel_size or megatron.tensor_model_parallel_size) > 1:
        raise UserError(
            f"model.lora.experts=true needs each expert complete on a rank, and {count_text(sharing, 'rank')} share "
            f"one ({_expert_tensor_parallel(megatron)}): set megatron.expert_tensor_parallel_size=1"
        )


def check_auxiliary_losses(megatron: MegatronSettings, *, version: str | None) -> None:
    """UserError: this version of megatron-core cannot scale the losses of routers. None: it is not installed."""
    if version is None or not megatron.has_auxiliary_loss or tuple(map(int, version.split(".")[:2])) >= (0, 19):
        return
    name = "moe_aux_loss_coeff" if megatron.moe_aux_loss_coeff else "moe_z_loss_coeff"
    raise UserError(
        f"megatron.{name} needs megatron-core 0.19 or newer, and {version} is installed. That version scales the "
        "losses of routers by tokens of a micro-batch and by the tensor-parallel size, and it offers no setting that "
        f"corrects this. Leave megatron.{name} out, or install a newer version (Python 3.12)"
    )


def megatron_version() -> str | None:
    """The installed version of megatron-core; None: it is not installed."""
    try:
        return metadata.version("megatron-core")
    except metadata.PackageNotFoundError:
        return None


def _expert_tensor_parallel(megatron: MegatronSettings) -> str:
    if megatron.expert_tensor_parallel_size is not None:
        return f"expert_tensor_parallel_size={megatron.expert_tensor_parallel_size}"
    return f"tensor_model_parallel_size={megatron.tensor_model_parallel_size} (expert_tensor_parallel_size is not set)"


def common_tensor_parallel_size(shape: ModelShape) -> int:
    """The largest tensor-parallel size that divides everything that is split over ranks. Its divisors are valid too."""
    sizes = (shape.num_heads, shape.num_groups)
    return math.gcd(*sizes) if shape.num_experts else math.gcd(*sizes, shape.ffn_size)


def _must_divide(key: str, ranks: int, size: int, what: str, shape: ModelShape, *, together: int) -> None:
    """UserError unless `ranks` divides `size`. It suggests the nearest divisor of `together`, which holds for all."""
    if size % ranks:
        nearest = _nearest_divisor(ranks, together)
        raise UserError(
            f"{key}={ranks} does not divide the {what}, {size}, of {shape.source}; the nearest that fits the model is "
            f"{nearest}"
        )


def _nearest_divisor(value: int, of: int) -> int:
    return min((n for n in range(1, of + 1) if of % n == 0), key=lambda n: (abs(n - value), n))


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
