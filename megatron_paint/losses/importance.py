"""Importance weights of responses that older weights have sampled. Axes: T tokens of several rollouts, in row order."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def prefix_weights(
    logp_T: torch.Tensor, old_logp_T: torch.Tensor, lengths: Sequence[int], *, limit: float
) -> torch.Tensor:
    """w_t = min(limit, product of p(y_i) / p_old(y_i) over the tokens i < t): the weight [T] of the loss at token t.

    A divergence at token t depends on the tokens before t and not on token t, which the teacher need not agree with.
    So without the limit, the expected sum of w_t loss_t over responses of p_old is that of loss_t over responses of p,
    and each first token has weight 1. This holds if nothing else depends on the rest of the response: not what the
    teacher is shown, not which tokens are selected, not which responses are kept. Otherwise the sum is biased. The
    limit bounds the variance, and biases the sum towards 0.
    logp_T, old_logp_T: nats, at the temperature of the sampling. lengths: tokens of each rollout. Computed in float64;
    the result has the type and device of logp_T, and no gradient.
    """
    ratio_T = logp_T.detach().to(torch.float64) - old_logp_T.to(logp_T.device, torch.float64)
    before = [part_T.cumsum(0) - part_T for part_T in ratio_T.split(list(lengths))]
    return torch.cat(before or [ratio_T]).exp().clamp(max=limit).to(logp_T.dtype)
