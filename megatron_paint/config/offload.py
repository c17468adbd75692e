"""Settings that keep data in host memory, and CUDA graphs: what contradicts them, and what is refused.

Each function takes the sections that it compares and yields error messages.
"""

from collections.abc import Iterator
from types import MappingProxyType

from megatron_paint.config.megatron import MegatronSettings
from megatron_paint.config.settings import (
    ModelSettings,
    OptimizerSettings,
    RolloutSettings,
)

STATE_TYPES = ("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")
STATE_BYTES = MappingProxyType({"fp32": 4, "bf16": 2})  # bytes of a number of the accepted types


def of_optimizer_state(megatron: MegatronSettings, optimizer: OptimizerSettings, model: ModelSettings) -> Iterator[str]:
    """The types of the optimiser's state, and the state in host memory."""
    yield from _of_offloaded_state(megatron)
    if not megatron.use_precision_aware_optimizer:
        for name in STATE_TYPES:
            if (chosen := getattr(megatron, name)) != "fp32":
                yield (
                    f"megatron.{name}={chosen} belongs to megatron.use_precision_aware_optimizer=true: set that, or "
                    f"leave {name} out"
                )
        return
    needs = "megatron.use_precision_aware_optimizer=true needs"
    if optimizer.name != "adam":
        yield f"{needs} optimizer.name=adam, and it is {optimizer.name}: set one of the two"
    if not megatron.use_distributed_optimizer:
        yield f"{needs} megatron.use_distributed_optimizer=true: set one of the two"
    if model.dtype != "bfloat16":
        yield (
            f"{needs} model.dtype=bfloat16, and it is {model.dtype}: with float32 weights it would store them twice. "
            "Set it to false"
        )
    yield from _of_state_types(megatron)


def _of_state_types(megatron: MegatronSettings) -> Iterator[str]:
    if megatron.main_grads_dtype != "fp32":
        yield (
            f"megatron.main_grads_dtype={megatron.main_grads_dtype} is not supported: a step adds up the gradients of "
            "all its tokens and divides once, and such a sum loses too many digits in bfloat16. Leave it out"
        )
    for name in STATE_TYPES[1:]:
        if (chosen := getattr(megatron, name)) not in STATE_BYTES:
            yield (
                f"megatron.{name}={chosen} is not supported: Transformer Engine scales this type by one factor for "
                "each shard of a weight, so a checkpoint would be rounded again when another layout loads it. Set "
                f"megatron.{name} to {'fp32' if name == 'main_params_dtype' else 'fp32 or bf16'}"
            )


def _of_offloaded_state(megatron: MegatronSettings) -> Iterator[str]:
    if not megatron.optimizer_cpu_offload:
        names = ("optimizer_offload_fraction", "overlap_cpu_optimizer_d2h_h2d", "pin_cpu_grads")
        for name in names:
            if (chosen := getattr(megatron, name)) != getattr(MegatronSettings, name):
                text = str(chosen).lower() if isinstance(chosen, bool) else f"{chosen:g}"
                yield (
                    f"megatron.{name}={text} belongs to megatron.optimizer_cpu_offload=true: set that, or leave "
                    f"{name} out"
                )
        return
    if not megatron.use_precision_aware_optimizer:
        yield (
            "megatron.optimizer_cpu_offload=true needs megatron.use_precision_aware_optimizer=true: without it the "
            "main weights stay on the GPU, and Megatron cannot load a checkpoint. Set both"
        )
    for name in STATE_TYPES[2:]:
        if (chosen := getattr(megatron, name)) != "fp32":
            yield (
                f"megatron.{name}={chosen} has no effect with megatron.optimizer_cpu_offload=true, whose moments are "
                f"float32: leave {name} out"
            )
    if megatron.optimizer_offload_fraction != 1:
        yield (
            f"megatron.optimizer_offload_fraction={megatron.optimizer_offload_fraction:g} is not supported: after a "
            "resume, Megatron would count the steps of the weights on the GPU wrongly. Set it to 1"
        )


def of_activation_offload(megatron: MegatronSettings) -> Iterator[str]:
    """Activations in host memory. `planning/layout.py` compares the number of layers with the model's."""
    name = "megatron.cpu_offloading=true"
    if not megatron.cpu_offloading:
        if megatron.cpu_offloading_num_layers:
            yield (
                f"megatron.cpu_offloading_num_layers={megatron.cpu_offloading_num_layers} belongs to {name}: "
                "set that, or leave cpu_offloading_num_layers out"
            )
        return
    if not megatron.cpu_offloading_num_layers:
        yield f"{name} moves the activations of megatron.cpu_offloading_num_layers layers, and that is 0: set it"
    if megatron.pipeline_model_parallel_size > 1:
        yield (
            f"{name} works on one pipeline stage only, in Megatron-Core, and megatron.pipeline_model_parallel_size="
            f"{megatron.pipeline_model_parallel_size}: set one of the two"
        )
    if megatron.recompute_granularity is not None:
        yield (
            f"{name} keeps activations that megatron.recompute_granularity={megatron.recompute_granularity} computes "
            "again: leave one of them out"
        )
    if megatron.transformer_impl == "local" or megatron.fp8_emulate:
        other = "transformer_impl=local" if megatron.transformer_impl == "local" else "fp8_emulate=true"
        yield f"{name} needs the layers of Transformer Engine, and megatron.{other}: leave one of them out"


def of_cuda_graphs(rollout: RolloutSettings, megatron: MegatronSettings) -> Iterator[str]:
    """`rollout.cuda_graphs`. `planning/layout.py` refuses mixtures of experts, and machines without a GPU."""
    if not rollout.cuda_graphs:
        return
    name = "rollout.cuda_graphs=true"
    if rollout.engine == "vllm":
        yield (
            f"{name} is about sampling in the trainer, and rollout.engine=vllm captures its own graphs; leave "
            "cuda_graphs out"
        )
    if megatron.pipeline_model_parallel_size > 1:
        yield (
            f"{name} captures a step of one process group, and with megatron.pipeline_model_parallel_size="
            f"{megatron.pipeline_model_parallel_size} a step waits for other stages: set one of the two"
        )
    if megatron.sequence_parallel:
        yield (
            f"{name} cannot capture a step with megatron.sequence_parallel=true: Megatron changes CUDA's random state "
            "in it. Set one of the two to false"
        )
    if megatron.fp8 is not None:
        yield (
            f"{name} cannot capture a step with megatron.fp8={megatron.fp8}, whose scales change from call to call: "
            "leave one of them out"
        )
    if megatron.cpu_offloading:
        yield f"{name} and megatron.cpu_offloading=true exclude each other in Megatron-Core: leave one of them out"
