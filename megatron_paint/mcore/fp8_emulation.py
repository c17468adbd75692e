"""The products of FP8 training in plain torch, for experiments without a GPU that has them.

The linear layers of the blocks multiply values that were rounded to FP8 and back. The sums are float32, and the results
have the type of the model, as on the hardware. Rounding follows Transformer Engine's recipes:

    tensorwise  one scale for a tensor, from its largest absolute value now
    blockwise   activations and gradients: a scale for each 1 x 128 values along the summed axis; weights: for each
                128 x 128; scales are powers of two

`e4m3` rounds everything to 4 exponent and 3 mantissa bits; `hybrid` rounds gradients to 5 and 2. Under tensor
parallelism a scale is that of a rank's shard. Everything else of the step is what it is with FP8: the embedding, the
output layer, norms, attention and adapters stay in the model's type, and calls are padded as FP8 needs.

Axes: T tokens, I inputs, O outputs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from megatron_paint.config.megatron import MegatronSettings
from megatron_paint.mcore.stage import Stage

LINEAR = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
BLOCK = 128
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
SMALLEST = 1e-12  # of a largest value: a block of zeros has a finite scale


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """How a recipe rounds tensors to FP8."""

    blockwise: bool
    gradients: torch.dtype

    def rows(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """Rounds activations or gradients, whose last axis is summed, to float32 values that FP8 can represent.

        The tensor of an expert without tokens is empty, and stays empty.
        """
        if not values.numel():
            return values.float()
        return _in_blocks(values, dtype, rows=1) if self.blockwise else _at_one_scale(values, dtype)

    def weight(self, values: Tensor) -> Tensor:
        """Rounds a weight. Its blocks are the same in both directions."""
        return _in_blocks(values, E4M3, rows=BLOCK) if self.blockwise else _at_one_scale(values, E4M3)


class Fp8Product:
    """Replaces the product of one of Megatron's linear layers, over its tensor-parallel ranks."""

    def __init__(self, rounding: Rounding, plain: Any) -> None:
        """plain: the product without FP8, with the same arguments."""
        self.rounding, self.plain = rounding, plain
        self.enabled = True

    def __call__(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        allreduce_dgrad: bool = False,
        sequence_parallel: bool = False,
        **more: Any,
    ) -> Tensor:
        if not self.enabled:
            given = {"allreduce_dgrad": allreduce_dgrad, "sequence_parallel": sequence_parallel, **more}
            return self.plain(input=input, weight=weight, bias=bias, **given)
        if sequence_parallel:
            input = gather_from_sequence_parallel_region(input, tensor_parallel_output_grad=True)
        elif allreduce_dgrad:
            input = copy_to_tensor_model_parallel_region(input)
        output = _Product.apply(input.flatten(0, -2), weight, self.rounding).unflatten(0, input.shape[:-1])
        return output if bias is None else output + bias


class _Product(torch.autograd.Function):
    """x [T, I] and w [O, I] -> x w^T [T, O]; each of the three products rounds its own two tensors."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, weight_OI: Tensor, rounding: Rounding) -> Tensor:
        ctx.save_for_backward(x_TI, weight_OI)
        ctx.rounding = rounding
        return (rounding.rows(x_TI, E4M3) @ rounding.weight(weight_OI).T).to(x_TI.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_TI, weight_OI = ctx.saved_tensors
        rounding, grad_x, grad_weight = ctx.rounding, None, None
        if ctx.needs_input_grad[0]:
            grad_x = (rounding.rows(grad_TO, rounding.gradients) @ rounding.weight(weight_OI)).to(x_TI.dtype)
        if ctx.needs_input_grad[1]:
            grad_OT, x_IT = grad_TO.T.contiguous(), x_TI.T.contiguous()
            grad_weight = rounding.rows(grad_OT, rounding.gradients) @ rounding.rows(x_IT, E4M3).T
            grad_weight = grad_weight.to(weight_OI.dtype)
        return grad_x, grad_weight, None


def emulate_fp8(stage: Stage, megatron: MegatronSettings) -> None:
    """Replaces the products of the blocks' linear layers, except of layers that stay in bfloat16."""
    gradients = E5M2 if megatron.fp8 == "hybrid" else E4M3
    rounding = Rounding(blockwise=megatron.fp8_recipe == "blockwise", gradients=gradients)
    last = stage.config.num_layers
    for number, layer in stage.layers.items():
        at_start = number < megatron.num_layers_at_start_in_bf16
        at_end = number >= last - megatron.num_layers_at_end_in_bf16
        if megatron.first_last_layers_bf16 and (at_start or at_end):
            continue
        for name, module in layer.named_modules():
            if name.rpartition(".")[2] in LINEAR:
                module._forward_impl = Fp8Product(rounding, module._forward_impl)


@contextmanager
def without_fp8(stage: Stage) -> Iterator[None]:
    """The stage computes in the model's type inside, with Transformer Engine's FP8 and with the emulated one."""
    emulated = [m._forward_impl for m in stage.modules() if isinstance(getattr(m, "_forward_impl", None), Fp8Product)]
    fp8, stage.config.fp8 = stage.config.fp8, None
    for product in emulated:
        product.enabled = False
    try:
        yield
    finally:
        stage.config.fp8 = fp8
        for product in emulated:
            product.enabled = True


def _at_one_scale(values: Tensor, dtype: torch.dtype) -> Tensor:
    values = values.float()
    scale = torch.finfo(dtype).max / values.abs().amax().clamp_min(SMALLEST)
    return _rounded(values * scale, dtype) / scale


def _in_blocks(values: Tensor, dtype: torch.dtype, *, rows: int) -> Tensor:
    """A scale, which is a power of two, for each block of `rows` x 128 values. The last blocks may be smaller."""
    height, width = values.shape
    padded = F.pad(values.float(), (0, -width % BLOCK, 0, -height % rows))
    blocks = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, rows))
    largest = blocks.abs().amax((1, 3), keepdim=True).clamp_min(SMALLEST)
    scale = torch.exp2(torch.floor(torch.log2(torch.finfo(dtype).max / largest)))
    return (_rounded(blocks * scale, dtype) / scale).flatten(2).flatten(0, 1)[:height, :width]


def _rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest values that `dtype` has. On a CPU its cast does not saturate for E5M2."""
    largest = torch.finfo(dtype).max
    return values.clamp(-largest, largest).to(dtype).float()
