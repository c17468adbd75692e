"""Megatron's data-parallel wrapper and optimiser, configured for a loss that is one sum, divided once."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from torch import Tensor

from megatron_paint.base.errors import UserError
from megatron_paint.config.megatron import MegatronSettings
from megatron_paint.config.offload import STATE_TYPES
from megatron_paint.config.settings import OptimizerSettings
from megatron_paint.mcore.model import Stage

STATE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def wrap_data_parallel(stage: Stage, megatron: MegatronSettings) -> list[DistributedDataParallel]:
    """Each chunk in Megatron's wrapper; gradients are summed, then divided once by the global token count."""
    config = DistributedDataParallelConfig(
        use_distributed_optimizer=megatron.use_distributed_optimizer,
        num_distributed_optimizer_instances=megatron.num_distributed_optimizer_instances,
        overlap_grad_reduce=megatron.overlap_grad_reduce,
        overlap_param_gather=megatron.overlap_param_gather,
        grad_reduce_in_fp32=True,
    )
    wrapped = [
        # Only the first chunk has several buckets, as in Megatron's own training: its backward pass comes last. The
        # gradients of the others are reduced while further backward passes run.
        DistributedDataParallel(stage.config, config, chunk, disable_bucketing=number > 0)
        for number, chunk in enumerate(stage.chunks)
    ]
    stage.config.finalize_model_grads_func = finalize_model_grads
    if megatron.overlap_grad_reduce:
        functions = [chunk.no_sync for chunk in wrapped]
        stage.config.no_sync_func = functions if len(functions) > 1 else functions[0]
    return wrapped


def complete_weights(wrapped: list[DistributedDataParallel]) -> None:
    """Gathers what a step with `megatron.overlap_param_gather` left on other replicas; all ranks call together.

    Megatron gathers a layer's weights when a forward pass of training reaches the layer. Whatever else reads weights
    calls this first.
    """
    for chunk in wrapped:
        for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
            if group.param_gather_handle is not None or not group.param_gather_dispatched:
                group.start_param_sync(force_sync=True)


def make_optimizer(
    wrapped: list[DistributedDataParallel], settings: OptimizerSettings, megatron: MegatronSettings
) -> MegatronOptimizer:
    """AdamW or SGD with float32 main weights."""
    model = wrapped[0].module.config
    dtype = model.params_dtype
    with _refusals_of_adam(megatron):
        config = OptimizerConfig(
            optimizer=settings.name,
            lr=settings.lr,
            min_lr=settings.min_lr,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.beta1,
            adam_beta2=settings.beta2,
            adam_eps=settings.eps,
            sgd_momentum=settings.momentum,
            clip_grad=settings.clip_grad,
            bf16=dtype is torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=megatron.use_distributed_optimizer,
            overlap_param_gather=megatron.overlap_param_gather,
            **_state_settings(megatron),
        )
        optimizer = get_megatron_optimizer(config, wrapped)
    model.grad_scale_func = optimizer.scale_loss
    return optimizer


@contextmanager
def _refusals_of_adam(megatron: MegatronSettings) -> Iterator[None]:
    """Makes a UserError of what an older Transformer Engine says to a precision-aware optimiser."""
    try:
        yield
    except (AssertionError, RuntimeError) as error:
        of_others = isinstance(error, (torch.OutOfMemoryError, dist.DistError))  # RuntimeErrors too
        if of_others or not megatron.use_precision_aware_optimizer:
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"megatron.use_precision_aware_optimizer=true: Transformer Engine refuses it ({reason}); install a newer "
            "one, or set it to false"
        ) from error


def _state_settings(megatron: MegatronSettings) -> dict[str, Any]:
    """How and where the optimiser stores its state, for Megatron's OptimizerConfig."""
    if not megatron.use_precision_aware_optimizer:
        return {}
    found: dict[str, Any] = {name: STATE_DTYPES[getattr(megatron, name)] for name in STATE_TYPES}
    found |= {
        "use_precision_aware_optimizer": True,
        # Megatron would save the lower half of each main weight, and cannot load it (0.16.1 and 0.19.2).
        "store_param_remainders": False,
    }
    if megatron.optimizer_cpu_offload:
        names = ("optimizer_cpu_offload", "optimizer_offload_fraction", "overlap_cpu_optimizer_d2h_h2d")
        found |= {name: getattr(megatron, name) for name in (*names, "pin_cpu_grads")}
    return found


def main_gradients(optimizer: MegatronOptimizer) -> list[tuple[list[Tensor], Any]]:
    """The gradient of the last backward pass: tensors on the host, and the group over which they are summed.

    One pair for each optimiser that Megatron chains. Each weight occurs exactly once within its group.
    """
    optimizer.prepare_grads()
    return [
        (
            [grad.detach().to("cpu", torch.float32, copy=True) for grad in _gradients_of(part)],
            part.get_grad_stats_parallel_group(),
        )
        for part in optimizer.chained_optimizers
    ]


def _gradients_of(part: MegatronOptimizer) -> list[Tensor]:
    if hasattr(part, "get_main_grads_for_grad_norm"):  # megatron-core before 0.19
        return part.get_main_grads_for_grad_norm()
    return part.get_grads_for_grad_norm()


def cosine(one: list[tuple[list[Tensor], Any]], other: list[tuple[list[Tensor], Any]], device: torch.device) -> float:
    """The cosine between two gradients of `main_gradients`, over all weights. All ranks call together."""
    total = torch.zeros(3, dtype=torch.float64)
    for (ours, group), (theirs, _) in zip(one, other, strict=True):
        sums = torch.zeros(3, dtype=torch.float64)
        for a, b in zip(ours, theirs, strict=True):
            a, b = a.double(), b.double()
            sums += torch.stack([(a * b).sum(), (a * a).sum(), (b * b).sum()])
        sums = sums.to(device)
        dist.all_reduce(sums, group=group)
        total += sums.cpu()
    return float(total[0] / (total[1] * total[2]).sqrt())


def take_step(
    optimizer: MegatronOptimizer, *, lr: float, weight_decay: float, largest_norm: float | None = None
) -> float:
    """One clipped step; returns the gradient's global norm before clipping. Weights of norms are not decayed.

    FloatingPointError: the gradient is not finite, or its norm is above `largest_norm`; no weight has been changed.
    """
    for group in optimizer.param_groups:  # as Megatron's own scheduler does, which this replaces
        group["lr"] = lr
        group["weight_decay"] = weight_decay * group["wd_mult"]
        if {"fused", "betas"} <= group.keys() and not any(p.is_cuda for p in group["params"]):
            # torch's Adam on a CPU: one pass over memory instead of nine, without copies of the moments.
            group["fused"] = True
    overflow = optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    if overflow or not norm < float("inf"):
        raise FloatingPointError(f"the gradient's norm is {norm}")
    if largest_norm is not None and norm > largest_norm:
        raise FloatingPointError(
            f"the gradient's norm, {norm:.4g}, is above optimizer.grad_norm_skip_threshold={largest_norm:g}"
        )
    optimizer.step()
    return norm
