"""The support of a target: the entries that a distribution p_0 finds plausible, p_0(v) >= ratio max p_0.

With energies (logits divided by the temperature) the rule is z_0(v) >= max z_0 + log ratio: it needs the maximum over
the complete vocabulary and no normaliser. The entry with the largest probability is always in the support.
Source: the threshold is the plausibility constraint of contrastive decoding (Li et al. 2022, arXiv 2210.15097).
Axes: T tokens, V this rank's vocabulary columns.
"""

from __future__ import annotations

import math

import torch

from megatron_paint.losses.elementwise.softmax_statistics import Softmax

# log q of an entry outside the support. Its exponential of 2e-35 counts as 0. A smaller number would be exactly 0, but
# MKL's exp takes five times as long where the result is not a normal number.
OUTSIDE = -80.0


def support_floor(highest_T: torch.Tensor, ratio: float) -> torch.Tensor:
    """The smallest energy [T] in the support, from the largest energy over the complete vocabulary."""
    return highest_T + math.log(ratio)


def outside(energies_TV: torch.Tensor, floor_T: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
    """1.0 where an entry is outside the support, else 0.0, written into `out`."""
    return torch.lt(energies_TV, floor_T[:, None], out=out)


def cut(log_q_TV: torch.Tensor, outside_TV: torch.Tensor) -> None:
    """Replaces log q by OUTSIDE where `outside_TV` is 1.0, and leaves it as it is, to the bit, where that is 0.0."""
    log_q_TV.addcmul_(log_q_TV, outside_TV, value=-1.0).add_(outside_TV, alpha=OUTSIDE)


def outside_mass(inside: Softmax, complete: Softmax) -> torch.Tensor:
    """The share [T] of a distribution outside the support, from its normalisers over the support and over everything.

    Exactly 0 where they are equal. The maximum over the support is never the larger one, so nothing overflows.
    """
    share_T = (inside.max_T - complete.max_T).exp() * (inside.sum_T / complete.sum_T)
    return (1.0 - share_T).clamp(0.0, 1.0)
