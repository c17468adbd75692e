"""The divergences over a chunk: value and gradient from normalised distributions, term by term.

p is the student, q the target, both over the whole vocabulary. Every sum of x log(x/y) is taken as the sum of
x (expm1(u) - u), u = log y - log x: the same total, because both sides sum to 1, but no term is negative and nothing
large cancels (off by 1e-6 in float32 where the plain sum is off by 1e-2 at 4e-5 nats). A clipped term counts as
clip + p - q accordingly.

Each gradient with respect to the student's logits has the form c p - B, where c needs sums over the vocabulary:
    forward KL   Q_A p - q [A]                  A: unclipped entries, Q_A: their target mass (1 without clip)
    reverse KL   -KL p - p (log q - log p)
    JSD          (1 - beta) (-KL(p||m) p - p (log m - log p)),   m = beta q + (1 - beta) p
So p and B replace the logits while the sums are taken, and c comes in when all ranks' sums are there.

On a CPU boolean masks and torch.where take 10 to 50 times as long as arithmetic, so masks are 0.0 and 1.0 here.
Axes: T tokens, V this rank's vocabulary columns, K packed sums.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from megatron_paint.losses.chunks import blocks
from megatron_paint.losses.config import InterpolationLossConfig
from megatron_paint.losses.statistics import Softmax


class Outcome(NamedTuple):
    """Per token: divergence and clipped loss in nats, without weights; c of the gradient; clipped mass and entries."""

    divergence_T: torch.Tensor
    loss_T: torch.Tensor
    coefficient_T: torch.Tensor
    clipped_share_T: torch.Tensor
    clipped_entries_T: torch.Tensor


class ChunkLogits(NamedTuple):
    """Logits over the temperature; partner_TV is None where the student is the partner."""

    student_TV: torch.Tensor
    teacher_TV: torch.Tensor
    partner_TV: torch.Tensor | None


def take_sums(
    logits: ChunkLogits,
    *,
    student: Softmax,
    target: Softmax,
    weight_T: torch.Tensor,
    config: InterpolationLossConfig,
    block_rows: int,
) -> torch.Tensor:
    """This rank's part of the sums [T, K] that finish() needs.

    weight_T is the lambda of each token's target (0: plain teacher), target its normaliser. Leaves p where
    the student's logits were and B where the teacher's were.
    """
    terms, parts = _TERMS[config.divergence], []
    for block in blocks(logits.student_TV.shape[0], block_rows):
        log_p_TV, log_q_TV = logits.student_TV[block], logits.teacher_TV[block]
        if config.interpolates:
            partner_TV = log_p_TV if logits.partner_TV is None else logits.partner_TV[block]
            log_q_TV.lerp_(partner_TV, weight_T[block, None])
        for log_TV, total in ((log_p_TV, student), (log_q_TV, target)):
            log_TV.sub_(total.max_T[block, None]).sub_(total.sum_T[block, None].log())
        u_TV = log_p_TV - log_q_TV
        parts.append(torch.stack(terms(log_p_TV.exp_(), log_q_TV.exp_(), u_TV, config), dim=1))
    return torch.cat(parts)


def finish(sums_TK: torch.Tensor, config: InterpolationLossConfig) -> Outcome:
    """The outcome from the sums over all ranks."""
    divergence_T = sums_TK[:, 0]
    none_T = torch.zeros_like(divergence_T)
    if config.divergence == "reverse_kl":
        return Outcome(divergence_T, divergence_T, -divergence_T, none_T, none_T)
    if config.divergence == "jsd":
        coefficient_T = (config.jsd_beta - 1.0) * sums_TK[:, 1]
        return Outcome(divergence_T, divergence_T, coefficient_T, none_T, none_T)
    if config.clip is None:
        return Outcome(divergence_T, divergence_T, torch.ones_like(divergence_T), none_T, none_T)
    _, loss_T, kept_T, clipped_T, entries_T = sums_TK.unbind(1)
    # Either sum is inexact near 1: take the small one, so that Q_A is exactly 1 where nothing is clipped.
    kept_T = torch.where(clipped_T < 0.5, 1.0 - clipped_T, kept_T)
    return Outcome(divergence_T, loss_T, kept_T, clipped_T, entries_T)


def form_gradient(logits: ChunkLogits, coefficient_T: torch.Tensor, scale_T: torch.Tensor) -> torch.Tensor:
    """scale (c p - B) [T, V] from what take_sums left in the logits; reuses the teacher's buffer."""
    gradient_TV = logits.teacher_TV.mul_(-scale_T[:, None])
    return gradient_TV.addcmul_(logits.student_TV, (scale_T * coefficient_T)[:, None])


def _forward_kl(
    p_TV: torch.Tensor, q_TV: torch.Tensor, u_TV: torch.Tensor, config: InterpolationLossConfig
) -> list[torch.Tensor]:
    terms_TV = _divergence_terms(q_TV, p_TV, u_TV)
    divergence_T = terms_TV.sum(1)
    if config.clip is None:
        return [divergence_T]
    clipped_TV = torch.lt(u_TV.mul_(q_TV), -config.clip, out=torch.empty_like(u_TV))
    # Not the term less its excess over the clip: that would cancel where the term is large.
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
    # log m - log q = log(1 + (1-beta) expm1(u)) and log m - log p = log(1 + beta expm1(-u)): the one whose expm1 cannot
    # overflow gives the other, as they differ by u.
    share_TV = torch.gt(u_TV, 0.0, out=torch.empty_like(u_TV)).mul_(2.0 * beta - 1.0).add_(1.0 - beta)
    log_TV = u_TV.abs().neg_().expm1_().mul_(share_TV).log1p_()
    m_TV = torch.lerp(p_TV, q_TV, beta)
    target_T = _divergence_terms(q_TV, m_TV, torch.clamp(u_TV, min=0.0, out=share_TV).add_(log_TV)).sum(1)
    u_p_TV = log_TV.sub_(u_TV.clamp_(max=0.0))
    student_T = _divergence_terms(p_TV, m_TV, u_p_TV).sum(1)
    torch.mul(p_TV, u_p_TV, out=q_TV).mul_(1.0 - beta)
    return [beta * target_T + (1.0 - beta) * student_T, student_T]


_TERMS = {"forward_kl": _forward_kl, "reverse_kl": _reverse_kl, "jsd": _jsd}


def _divergence_terms(x_TV: torch.Tensor, y_TV: torch.Tensor, u_TV: torch.Tensor) -> torch.Tensor:
    """x (expm1(u) - u), u = log y - log x; leaves its inputs alone.

    Above u = 1, where expm1 could overflow, it is x (e - 1 - u) and y - e x, which below 1 is negative and left out.
    """
    terms_TV = u_TV.clamp(max=1.0).expm1_().sub_(u_TV).mul_(x_TV)
    return terms_TV.add_(torch.sub(y_TV, x_TV, alpha=math.e).clamp_(min=0.0))
