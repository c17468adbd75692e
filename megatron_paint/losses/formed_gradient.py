"""Hands a gradient that was formed in the forward pass to autograd. Axes: T tokens, V vocabulary columns, H hidden."""

from __future__ import annotations

from typing import Any

import torch

from megatron_paint.losses.gemm import OutputLayerGradient


def attach_gradient(
    value_T: torch.Tensor, *, hidden_TH: torch.Tensor, weight_VH: torch.Tensor, gradient: OutputLayerGradient
) -> torch.Tensor:
    """value_T as a differentiable tensor whose sum has the given gradients.

    backward scales by the one factor that all of value_T's incoming gradient has in common. Raises ValueError in
    backward where there is no such factor (the formed gradient would be wrong), RuntimeError in a second backward (the
    buffers are scaled in place and handed out, so that no second copy of the weight's gradient exists).
    """
    return _FormedGradient.apply(
        hidden_TH,
        weight_VH,
        value_T,
        [gradient.dhidden_TH, None if gradient.weight is None else gradient.weight.total_VH],
    )


class _FormedGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: torch.Tensor,
        weight_VH: torch.Tensor,
        value_T: torch.Tensor,
        gradients: list[torch.Tensor | None],
    ) -> torch.Tensor:
        ctx.gradients = gradients
        ctx.dtypes = (hidden_TH.dtype, weight_VH.dtype)
        return value_T.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_T: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "the loss's gradient was formed in the forward pass and handed out by the first backward; call the "
                "loss again for another one"
            )
        factor = _common_factor(grad_T)
        gradients, ctx.gradients = ctx.gradients, None
        scaled = [
            None if gradient is None else (gradient if factor == 1.0 else gradient.mul_(factor)).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None)


def _common_factor(grad_T: torch.Tensor) -> float:
    if not grad_T.numel():
        return 1.0
    low, high = (float(value) for value in grad_T.aminmax())
    if low < high:
        raise ValueError(
            f"loss_T: its incoming gradient goes from {low:g} to {high:g}; the gradient was formed in the forward "
            "pass, so all tokens share one factor; sum loss_T, and pass weights of tokens as token_weight_T"
        )
    return low
