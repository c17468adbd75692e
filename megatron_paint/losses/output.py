"""What losses return. Axes: T response tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, kw_only=True)
class InterpolationOutput:
    """The interpolation loss of every token and what was measured there; only loss_T has a gradient.

    loss_T [T], float32 or float64: weights and clip included, 0 where the position carries no loss; sum it.
    student_entropy_T, teacher_entropy_T [T]: nats, over the complete vocabulary, at the loss temperature.
    selected_T [T] bool: positions in the sparse set M.
    divergence_T [T]: the divergence to the position's target in nats, at every position, without clip and weights.
    clipped_share_T [T] in [0, 1]: target mass on clipped entries, 1 - Q_A. Under the clip of tokens: the share of the
    gradient that the clip took. 0 without clip.
    clipped_entries_T [T] int64: how many vocabulary entries were clipped; under the clip of tokens 1 where it was.
    carries_loss_T [T] bool: all positions, or the selected ones under elsewhere="skip".
    token_logp_T [T]: the student's log-probability of the given token at token_temperature, before any sampling
    filter; None when no token ids were given.
    outside_mass_T [T] in [0, 1]: the target's mass outside the support before it is cut. support_size_T [T] int64:
    entries in the support. Both None without a support.
    """

    loss_T: torch.Tensor
    student_entropy_T: torch.Tensor
    teacher_entropy_T: torch.Tensor
    selected_T: torch.Tensor
    divergence_T: torch.Tensor
    clipped_share_T: torch.Tensor
    clipped_entries_T: torch.Tensor
    carries_loss_T: torch.Tensor
    token_logp_T: torch.Tensor | None = None
    outside_mass_T: torch.Tensor | None = None
    support_size_T: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class LossOutput:
    """The loss of every token of a micro-batch, as a step uses it; only loss_T has a gradient.

    loss_T [T], float32 or float64: 0 where the token carries no loss. carries_loss_T, selected_T [T] bool.
    token_logp_T [T]: nats; None where the loss does not compute it.
    sums: per-token values [T] by name. Each is added up over all tokens of a response and becomes
    `SampleScore.sums[name]`. A loss puts 0 where a token does not count, and leaves out what it does not measure.
    per_token: values [T] by name that `SampleScore.per_token` keeps for each token.
    kept: more of them, for the samples whose tokens are kept (`run.keep_token_values`).
    """

    loss_T: torch.Tensor
    carries_loss_T: torch.Tensor
    selected_T: torch.Tensor
    sums: dict[str, torch.Tensor]
    per_token: dict[str, torch.Tensor] = field(default_factory=dict)
    kept: dict[str, torch.Tensor] = field(default_factory=dict)
    token_logp_T: torch.Tensor | None = None
