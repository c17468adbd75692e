"""Hands a gradient that was formed in the forward pass to autograd. Axes: T tokens, V vocabulary columns, H hidden."""

from __future__ import annotations

from typing import Any

import torch

from megatron_paint.losses.output_layer.products import OutputLayerGradient


def attach_gradient(
    value_T: torch.Tensor, *, hidden_TH: torch.Tensor, weight_VH: torch.Tensor, gradient: OutputLayerGradient
) -> torch.Tensor:
    """value_T as a differentiable tensor whose sum has the given gradients.

    backward scales by the one factor that all of value_T's incoming gradient has in common; the weight's gradient goes
    to the parameter's main_grad where there is one. Raises ValueError in backward where there is no such factor (the
    formed gradient would be wrong), RuntimeError in a second backward (the buffers are scaled in place and handed out,
    so that no second copy of the weight's gradient exists).
    """
    return _FormedGradient.apply(hidden_TH, weight_VH, value_T, gradient)


class _FormedGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: torch.Tensor,
        weight_VH: torch.Tensor,
        value_T: torch.Tensor,
        gradient: OutputLayerGradient,
    ) -> torch.Tensor:
        ctx.gradient = gradient
        ctx.hidden_dtype = hidden_TH.dtype
        return value_T.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_T: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.gradient is None:
            raise RuntimeError(
                "the loss's gradient was formed in the forward pass and handed out by the first backward; call the "
                "loss again for another one"
            )
        factor = _common_factor(grad_T)
        gradient, ctx.gradient = ctx.gradient, None
        dhidden_TH, weight = gradient.dhidden_TH, gradient.weight
        if dhidden_TH is not None:
            dhidden_TH = (dhidden_TH if factor == 1.0 else dhidden_TH.mul_(factor)).to(ctx.hidden_dtype)
        return dhidden_TH, None if weight is None else weight.hand_over(factor), None, None


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
