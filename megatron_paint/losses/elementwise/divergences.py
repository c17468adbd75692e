"""The divergences over a tile of a chunk: sums and gradient from normalised distributions, term by term, in torch.

p is the student, q the target, both over the complete vocabulary. Every sum of x log(x/y) is computed as the sum of
x (expm1(u) - u), u = log y - log x: the same total, because both sides sum to 1, but no term is negative and nothing
large cancels (an error of 1e-6 in float32 where the plain sum has 1e-2, at 4e-5 nats). A clipped term therefore counts
as clip + p - q. The clip of tokens is applied to the divergence itself: the gradient of a token is that of its
divergence, made smaller.

Each gradient with respect to the student's logits has the form c p - B, where c needs sums over the vocabulary:
    forward KL   Q_A p - q [A]                  A: unclipped entries, Q_A: their target mass (1 without clip)
    reverse KL   -KL p - p (log q - log p)
    JSD          (1 - beta) (-KL(p||m) p - p (log m - log p)),   m = beta q + (1 - beta) p
So p and B replace the logits while the sums are computed; c is known after all ranks' sums are added.

On a CPU boolean masks and torch.where take 10 to 50 times as long as arithmetic, so masks are 0.0 and 1.0.
Axes: T tokens, V vocabulary columns of the tile, K packed sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from megatron_paint.config.loss import InterpolationLossConfig
from megatron_paint.losses import reference_divergences


class Outcome(NamedTuple):
    """Per token: divergence and clipped loss in nats, without weights; c of the gradient and the factor of the complete
    gradient; clipped mass and entries."""

    divergence_T: torch.Tensor
    loss_T: torch.Tensor
    coefficient_T: torch.Tensor
    factor_T: torch.Tensor
    clipped_share_T: torch.Tensor
    clipped_entries_T: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """One divergence of target q and student p, as the torch backend and the reference compute it.

    The Triton kernel has its own arithmetic for each: `divergence_kernel`.
    """

    # Sums over the vocabulary that a token needs; the first one is the divergence.
    sums: Callable[[InterpolationLossConfig], int]
    # From p, q and u = log p - log q of a tile, which they may overwrite: its sums [T]; leaves B where q was.
    terms: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, InterpolationLossConfig], list[torch.Tensor]]
    # c [T] of the gradient from the sums [T, K]; None: always 1.
    coefficient: Callable[[torch.Tensor, InterpolationLossConfig], torch.Tensor] | None
    # From log p and log q: the terms of the reference loss.
    reference: Callable[[torch.Tensor, torch.Tensor, InterpolationLossConfig], torch.Tensor]


def divergence_of(config: InterpolationLossConfig) -> Divergence:
    """The table's entry for `config.divergence`; ValueError for a name that the table does not have."""
    found = DIVERGENCES.get(config.divergence)
    if found is None:
        raise ValueError(
            f"loss setting divergence: got {config.divergence!r}; it is one of {', '.join(DIVERGENCES)}; "
            "choose one of them"
        )
    return found


def coefficient_is_one(config: InterpolationLossConfig) -> bool:
    """Whether the gradient is p - B for any sums, so that it needs none of them."""
    return divergence_of(config).coefficient is None and config.clip is None


def take_terms(log_p_TV: torch.Tensor, log_q_TV: torch.Tensor, config: InterpolationLossConfig) -> list[torch.Tensor]:
    """This tile's sums [T] in the order of finish(); replaces log_p_TV by p and log_q_TV by B."""
    u_TV = log_p_TV - log_q_TV
    return divergence_of(config).terms(log_p_TV.exp_(), log_q_TV.exp_(), u_TV, config)


def finish(sums_TK: torch.Tensor, config: InterpolationLossConfig) -> Outcome:
    """The outcome from the sums over all ranks."""
    divergence, divergence_T = divergence_of(config), sums_TK[:, 0]
    none_T, one_T = torch.zeros_like(divergence_T), torch.ones_like(divergence_T)
    if config.clips_entries:
        _, loss_T, kept_T, clipped_T, entries_T = sums_TK.unbind(1)
        # Each sum is inexact near 1. The smaller one is used, so that Q_A is exactly 1 if nothing is clipped.
        kept_T = torch.where(clipped_T < 0.5, 1.0 - clipped_T, kept_T)
        return Outcome(divergence_T, loss_T, kept_T, one_T, clipped_T, entries_T)
    coefficient_T = one_T if divergence.coefficient is None else divergence.coefficient(sums_TK, config)
    if config.clip is None:
        return Outcome(divergence_T, divergence_T, coefficient_T, one_T, none_T, none_T)
    times_clip_T = (divergence_T / config.clip).clamp(min=1.0)
    loss_T = torch.where(times_clip_T > 1.0, config.clip * (1.0 + times_clip_T.log()), divergence_T)
    factor_T = 1.0 / times_clip_T
    clipped_T = (times_clip_T > 1.0).to(loss_T.dtype)
    return Outcome(divergence_T, loss_T, coefficient_T, factor_T, 1.0 - factor_T, clipped_T)


def _forward_kl(
    p_TV: torch.Tensor, q_TV: torch.Tensor, u_TV: torch.Tensor, config: InterpolationLossConfig
) -> list[torch.Tensor]:
    terms_TV = _divergence_terms(q_TV, p_TV, u_TV)
    divergence_T = terms_TV.sum(1)
    if not config.clips_entries:
        return [divergence_T]
    clipped_TV = torch.lt(u_TV.mul_(q_TV), -config.clip, out=torch.empty_like(u_TV))
    # The term minus its excess over the clip would cancel if the term is large.
    limit_TV = torch.sub(p_TV, q_TV, out=u_TV).add_(config.clip)
    loss_T = terms_TV.lerp_(limit_TV, clipped_TV).sum(1)
    clipped_mass_T = torch.mul(q_TV, clipped_TV, out=u_TV).sum(1)
    kept_mass_T = q_TV.sub_(u_TV).sum(1)
    return [divergence_T, loss_T, kept_mass_T, clipped_mass_T, clipped_TV.sum(1)]


def _reverse_kl(
    p_TV: torch.Tensor, q_TV: torch.Tensor, u_TV: torch.Tensor, config: InterpolationLossConfig
) -> list[torch.Tensor]:
    u_TV.neg_()
    divergence_T = _divergence_terms(p_TV, q_TV, u_TV).sum(1)
    torch.mul(p_TV, u_TV, out=q_TV)
    return [divergence_T]


def _jsd(
    p_TV: torch.Tensor, q_TV: torch.Tensor, u_TV: torch.Tensor, config: InterpolationLossConfig
) -> list[torch.Tensor]:
    beta = config.jsd_beta
    above_TV = torch.gt(u_TV, 0.0, out=torch.empty_like(u_TV))
    u_p_TV, u_q_TV = _logs_to_mixture(u_TV, above_TV, beta)
    m_TV = torch.lerp(p_TV, q_TV, beta)
    target_T = _divergence_terms(q_TV, m_TV, u_q_TV).sum(1)
    student_T = _divergence_terms(p_TV, m_TV, u_p_TV).sum(1)
    torch.mul(p_TV, u_p_TV, out=q_TV).mul_(1.0 - beta)
    return [beta * target_T + (1.0 - beta) * student_T, student_T]


def _logs_to_mixture(u_TV: torch.Tensor, above_TV: torch.Tensor, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """log m - log p = log(1 + beta expm1(-u)) and log m - log q = log(1 + (1 - beta) expm1(u)); overwrites u.

    They differ by u, but a beta near 0 or 1 makes one of them far smaller than u, so each is computed separately. With
    v = |u|, `fall` is the logarithm for -v, at most 0, and `rise` the one for v, at least 0. expm1(v) is computed as
    -expm1(-v) / exp(-v); above 80, where that could overflow, the logarithm is a line.
    """
    v_TV = u_TV.abs_()
    near_TV = v_TV.clamp(max=80.0)
    v_TV.sub_(near_TV)
    fall_TV = _expm1(near_TV.neg())
    below_TV = 1.0 - above_TV
    rise_share_TV = above_TV * (1.0 - beta) + below_TV * beta
    rise_TV = near_TV.exp_().mul_(fall_TV).mul_(rise_share_TV).neg_().log1p_().add_(v_TV)
    fall_TV.mul_(above_TV * beta + below_TV * (1.0 - beta)).log1p_()
    return torch.lerp(rise_TV, fall_TV, above_TV), torch.lerp(fall_TV, rise_TV, above_TV)


def _divergence_terms(x_TV: torch.Tensor, y_TV: torch.Tensor, u_TV: torch.Tensor) -> torch.Tensor:
    """x (expm1(u) - u), u = log y - log x; does not change its inputs.

    Above u = 1, where expm1 could overflow, it is x (e - 1 - u) + (y - e x).
    Below 1 the part y - e x is negative and counts as 0.
    """
    # Finding the largest u costs a CPU a fifth of what it can save; a GPU would have to wait for the result.
    if not u_TV.is_cuda and u_TV.numel() and float(u_TV.amax()) <= 1.0:
        return _expm1(u_TV.clone()).sub_(u_TV).mul_(x_TV)
    terms_TV = _expm1(u_TV.clamp(max=1.0)).sub_(u_TV).mul_(x_TV)
    return terms_TV.add_(torch.sub(y_TV, x_TV, alpha=math.e).clamp_(min=0.0))


def _expm1(values: torch.Tensor) -> torch.Tensor:
    """expm1 in place, for values up to 1.

    On a CPU torch's expm1 takes 15 to 30 times as long as exp. In float32 this computes 2 t / (1 - t), t = tanh(v / 2),
    which is accurate near 0 and below 1, in a third of the time. float64 is for exactness, not for speed.
    """
    if values.is_cuda or values.dtype != torch.float32:
        return values.expm1_()
    tanh = values.mul_(0.5).tanh_()
    return tanh.div_(torch.add(_HALF, tanh, alpha=-0.5))


_HALF = torch.tensor(0.5)

# The only table of divergences: any other name is refused everywhere, and the tests run through all entries.
DIVERGENCES = {
    "forward_kl": Divergence(
        sums=lambda config: 5 if config.clips_entries else 1,
        terms=_forward_kl,
        coefficient=None,
        reference=reference_divergences.forward_kl,
    ),
    "reverse_kl": Divergence(
        sums=lambda config: 1,
        terms=_reverse_kl,
        coefficient=lambda sums_TK, config: -sums_TK[:, 0],
        reference=reference_divergences.reverse_kl,
    ),
    "jsd": Divergence(
        sums=lambda config: 2,
        terms=_jsd,
        coefficient=lambda sums_TK, config: (config.jsd_beta - 1.0) * sums_TK[:, 1],
        reference=reference_divergences.jsd,
    ),
}
