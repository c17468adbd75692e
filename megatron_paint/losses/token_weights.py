"""Weights of a response's tokens in the loss, without a gradient. Axes: T tokens of several rollouts, in row order.

position: w = minimum + (1 - minimum) sigmoid((t - center) / width), with t = (i - 1/2) / n at token i of n. The tokens
after the first third of a response, which carry out what the first ones decide, count in full. Source: PW-OPSD (arXiv
2605.21606). PW-OPSD then takes the mean of each response and the mean over responses; here the loss stays a mean over
tokens.

divergence: a form of our own after DASH (arXiv 2608.06243). With d the token's divergence and m its mean over the
rollout, g = sigmoid((d - m) / (width m)) is high where teacher and student differ more than usual there. From the last
token to the first, c = g d + (1 - g) c': a token where they differ little gets the credit c' of the token after it, so
it counts if what follows it is wrong. Then w = minimum + (1 - minimum) sigmoid((c - m) / (width m)).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_paint.config.loss import InterpolationLossConfig


def token_weights(
    divergence_T: torch.Tensor | None, lengths: Sequence[int], config: InterpolationLossConfig, *, like: torch.Tensor
) -> torch.Tensor:
    """The weight [T] of each token by `config.token_weight`, in the type and on the device of `like`.

    divergence_T: of each token, for token_weight="divergence"; a rollout whose divergences are all 0 has weights 1. It
    is copied to the host: credit is passed on from token to token.
    """
    if config.token_weight == "uniform":
        return torch.ones_like(like)
    if config.token_weight == "position":
        weights = [_by_position(length, config) for length in lengths]
    else:
        parts = divergence_T.detach().to("cpu", torch.float64).split(list(lengths))
        weights = [_by_divergence(part_T, config) for part_T in parts]
    return torch.cat(weights or [torch.zeros(0)]).to(like)


def _by_position(length: int, config: InterpolationLossConfig) -> torch.Tensor:
    place_T = (torch.arange(length, dtype=torch.float64) + 0.5) / length
    return _squashed((place_T - config.position_center) / config.position_width, config)


def _by_divergence(divergence_T: torch.Tensor, config: InterpolationLossConfig) -> torch.Tensor:
    mean = divergence_T.mean() if len(divergence_T) else 0.0
    if mean == 0.0:
        return torch.ones_like(divergence_T)
    ratio_T = divergence_T / mean
    gate_T = torch.sigmoid((ratio_T - 1.0) / config.divergence_width)
    ratios, gates = ratio_T.tolist(), gate_T.tolist()
    credits = [ratios[-1]]
    for ratio, gate in zip(reversed(ratios[:-1]), reversed(gates[:-1]), strict=True):
        credits.append(gate * ratio + (1.0 - gate) * credits[-1])
    credit_T = torch.tensor(credits[::-1], dtype=torch.float64)
    return _squashed((credit_T - 1.0) / config.divergence_width, config)


def _squashed(value_T: torch.Tensor, config: InterpolationLossConfig) -> torch.Tensor:
    """A weight between the smallest one and 1."""
    return config.token_weight_minimum + (1.0 - config.token_weight_minimum) * torch.sigmoid(value_T)
