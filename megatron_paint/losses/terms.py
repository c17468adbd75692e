"""The divergences over a chunk: value and gradient from normalised distributions, term by term.

p is the student, q the target, both over the whole vocabulary; d = log q - log p. Every sum of x log(x/y) is taken as
sum of x (d + expm1(-d)), d = log x - log y: the same total, because both sides sum to 1, but no term is negative and
nothing large cancels (off by 1e-6 in float32 where the plain sum is off by 1e-2 at 4e-5 nats). A clipped term counts
as clip + p - q accordingly.

Each gradient with respect to the student's logits has the form B + c p, where c needs sums over the vocabulary:
    forward KL   p Q_A - q [A]                  A: unclipped entries, Q_A: their target mass (1 without clip)
    reverse KL   p (log p - log q) - KL p
    JSD          (1 - beta) (p (log p - log m) - KL(p||m) p),   m = beta q + (1 - beta) p
So p and B replace the logits while the sums are taken, and c p is added when all ranks' sums are in.
Axes: T tokens, V this rank's vocabulary columns, K packed sums.
"""

from __future__ import annotations

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
    keep_gradient: bool,
) -> torch.Tensor:
    """This rank's part of the sums [T, K] that finish() needs.

    weight_T is the lambda of each token's target (0: plain teacher), target its normaliser. keep_gradient overwrites
    the student's logits with p and the teacher's with B.
    """
    parts = []
    for block in blocks(logits.student_TV.shape[0], block_rows):
        student_TV, teacher_TV = logits.student_TV[block], logits.teacher_TV[block]
        log_p_TV = student_TV - student.max_T[block, None]
        if not config.interpolates:
            d_TV = teacher_TV - target.max_T[block, None]
        else:
            partner_TV = student_TV if logits.partner_TV is None else logits.partner_TV[block]
            d_TV = torch.lerp(teacher_TV, partner_TV, weight_T[block, None]).sub_(target.max_T[block, None])
        p_TV = log_p_TV.exp().div_(student.sum_T[block, None])
        q_TV = d_TV.exp().div_(target.sum_T[block, None])
        d_TV.sub_(log_p_TV).sub_((target.sum_T[block].log() - student.sum_T[block].log())[:, None])
        del log_p_TV
        sums, rest_TV = _TERMS[config.divergence](p_TV, q_TV, d_TV, config)
        parts.append(torch.stack(sums, dim=1))
        if keep_gradient:
            student_TV.copy_(p_TV)
            teacher_TV.copy_(rest_TV)
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
    """scale (B + c p) [T, V] from what take_sums left in the logits; reuses the teacher's buffer."""
    gradient_TV = logits.teacher_TV.mul_(scale_T[:, None])
    return gradient_TV.addcmul_(logits.student_TV, (scale_T * coefficient_T)[:, None])


def _forward_kl(
    p_TV: torch.Tensor, q_TV: torch.Tensor, d_TV: torch.Tensor, config: InterpolationLossConfig
) -> tuple[list[torch.Tensor], torch.Tensor]:
    terms_TV = _divergence_terms(q_TV, p_TV, d_TV)
    divergence_T = terms_TV.sum(1)
    if config.clip is None:
        return [divergence_T], q_TV.neg_()
    clipped_TV = d_TV.mul_(q_TV) > config.clip
    # Not the term less its excess over the clip: that would cancel where the term is large.
    loss_T = torch.where(clipped_TV, p_TV - q_TV + config.clip, terms_TV).sum(1)
    clipped_mass_T = torch.where(clipped_TV, q_TV, 0.0).sum(1)
    kept_TV = q_TV.masked_fill_(clipped_TV, 0.0)
    sums = [divergence_T, loss_T, kept_TV.sum(1), clipped_mass_T, clipped_TV.sum(1).to(q_TV.dtype)]
    return sums, kept_TV.neg_()


def _reverse_kl(
    p_TV: torch.Tensor, q_TV: torch.Tensor, d_TV: torch.Tensor, config: InterpolationLossConfig
) -> tuple[list[torch.Tensor], torch.Tensor]:
    e_TV = d_TV.neg_()
    divergence_T = _divergence_terms(p_TV, q_TV, e_TV).sum(1)
    return [divergence_T], e_TV.mul_(p_TV)


def _jsd(
    p_TV: torch.Tensor, q_TV: torch.Tensor, d_TV: torch.Tensor, config: InterpolationLossConfig
) -> tuple[list[torch.Tensor], torch.Tensor]:
    beta = config.jsd_beta
    # log m - log p = log(1 + beta expm1(d)) and log m - log q = log(1 + (1-beta) expm1(-d)): the one whose expm1 cannot
    # overflow gives the other by adding d.
    positive_TV = d_TV > 0.0
    share_TV = torch.where(positive_TV, d_TV.new_tensor(1.0 - beta), d_TV.new_tensor(beta))
    log_TV = d_TV.abs().neg_().expm1_().mul_(share_TV).log1p_().neg_()
    log_qm_TV = torch.where(positive_TV, log_TV, log_TV + d_TV)
    log_pm_TV = torch.where(positive_TV, log_TV - d_TV, log_TV)
    del positive_TV, share_TV, log_TV
    m_TV = torch.lerp(p_TV, q_TV, beta)
    student_T = _divergence_terms(p_TV, m_TV, log_pm_TV).sum(1)
    target_T = _divergence_terms(q_TV, m_TV, log_qm_TV).sum(1)
    return [beta * target_T + (1.0 - beta) * student_T, student_T], log_pm_TV.mul_(p_TV).mul_(1.0 - beta)


_TERMS = {"forward_kl": _forward_kl, "reverse_kl": _reverse_kl, "jsd": _jsd}


def _divergence_terms(x_TV: torch.Tensor, y_TV: torch.Tensor, d_TV: torch.Tensor) -> torch.Tensor:
    """x (d + expm1(-d)), d = log x - log y, or x d + (y - x) where expm1 could overflow; leaves its inputs alone."""
    terms_TV = d_TV.clamp(min=-1.0).neg_().expm1_().add_(d_TV).mul_(x_TV)
    far_TV = torch.addcmul(y_TV, x_TV, d_TV).sub_(x_TV)
    return torch.where(d_TV < -1.0, far_TV, terms_TV)
