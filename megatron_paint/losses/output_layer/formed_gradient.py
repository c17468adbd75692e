"""Passes a gradient that the forward pass computed to autograd. Axes: T tokens, V vocabulary columns, H hidden."""

from __future__ import annotations

from typing import Any

import torch

from megatron_paint.losses.output_layer.products import OutputLayerGradient


def attach_gradient(
    value_T: torch.Tensor, *, hidden_TH: torch.Tensor, weight_VH: torch.Tensor, gradient: OutputLayerGradient
) -> torch.Tensor:
    """value_T as a differentiable tensor whose sum has the given gradients.

    All tokens of value_T must have the same incoming gradient; backward multiplies by it. The weight's gradient goes to
    the parameter's main_grad if it has one. backward raises ValueError if the incoming gradients differ (the computed
    gradient would be wrong), and RuntimeError in a second call: the buffers are scaled in place and released, so that
    no second copy of the weight's gradient exists.
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
                "the forward pass computed the loss's gradient, and the first backward released it; call the "
                "loss again for another one"
            )
        factor = _common_factor(grad_T)
        gradient, ctx.gradient = ctx.gradient, None
        dhidden_TH, weight = gradient.dhidden_TH, gradient.weight
        if dhidden_TH is not None:
            dhidden_TH = (dhidden_TH if factor == 1.0 else dhidden_TH.mul_(factor)).to(ctx.hidden_dtype)
        return dhidden_TH, None if weight is None else weight.release(factor), None, None


def _common_factor(grad_T: torch.Tensor) -> float:
    if not grad_T.numel():
        return 1.0
    low, high = (float(value) for value in grad_T.aminmax())
    if low < high:
        raise ValueError(
            f"loss_T: its incoming gradient goes from {low:g} to {high:g}; the forward pass computed the gradient, "
            "so all tokens share one factor; sum loss_T, and pass weights of tokens as token_weight_T"
        )
    return low
