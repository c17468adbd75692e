"""The support of a target: the entries that a distribution p_0 finds plausible, p_0(v) >= ratio max p_0.

With energies (logits divided by the temperature) the rule is z_0(v) >= max z_0 + log ratio: it needs the maximum over
the complete vocabulary and no normaliser. The entry with the largest probability is always in the support.
Source: the threshold is the plausibility constraint of contrastive decoding (Li et al. 2022, arXiv 2210.15097).
Axes: T tokens, V this rank's vocabulary columns.
"""

from __future__ import annotations

import math

import torch

# Added to the energy of an entry outside the support: its exponential is 0, and its differences stay finite.
OUTSIDE = -1e30
# An entry's mass relative to the target's normaliser is computed up to exp of this, so that no sum overflows.
LARGEST_EXPONENT = 60.0


def support_floor(highest_T: torch.Tensor, ratio: float) -> torch.Tensor:
    """The smallest energy [T] in the support, from the largest energy over the complete vocabulary."""
    return highest_T + math.log(ratio)


def outside(energies_TV: torch.Tensor, floor_T: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
    """1.0 where an entry is outside the support, else 0.0, written into `out`."""
    return torch.lt(energies_TV, floor_T[:, None], out=out)


def outside_mass(relative_T: torch.Tensor) -> torch.Tensor:
    """The share of the uncut target outside the support, from its mass there relative to its mass inside."""
    return relative_T / (1.0 + relative_T)
