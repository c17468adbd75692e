"""The divergences of the reference loss, in plain autograd; no other implementation shares this arithmetic.

Each function returns terms [T, V] whose sum over the vocabulary is the divergence of target q and student p.
Axes: T tokens, V the vocabulary or this rank's columns of it.
"""

from __future__ import annotations

import math

import torch

from megatron_paint.config.loss import InterpolationLossConfig


def forward_kl(logp_TV: torch.Tensor, logq_TV: torch.Tensor, config: InterpolationLossConfig) -> torch.Tensor:
    """KL(q || p)."""
    return kl_terms(logq_TV, logp_TV, logq_TV - logp_TV)


def reverse_kl(logp_TV: torch.Tensor, logq_TV: torch.Tensor, config: InterpolationLossConfig) -> torch.Tensor:
    """KL(p || q)."""
    return kl_terms(logp_TV, logq_TV, logp_TV - logq_TV)


def jsd(logp_TV: torch.Tensor, logq_TV: torch.Tensor, config: InterpolationLossConfig) -> torch.Tensor:
    """beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p.

    A ratio above e^80 is cut there: the smaller of its two probabilities has no mass that matters.
    """
    beta, u_TV = config.jsd_beta, logp_TV - logq_TV
    logm_TV = torch.logaddexp(logq_TV + math.log(beta), logp_TV + math.log1p(-beta))
    q_less_m_TV = -torch.log1p((1.0 - beta) * torch.expm1(u_TV.clamp(max=80.0)))
    p_less_m_TV = -torch.log1p(beta * torch.expm1((-u_TV).clamp(max=80.0)))
    return beta * kl_terms(logq_TV, logm_TV, q_less_m_TV) + (1.0 - beta) * kl_terms(logp_TV, logm_TV, p_less_m_TV)


def kl_terms(logx_TV: torch.Tensor, logy_TV: torch.Tensor, d_TV: torch.Tensor) -> torch.Tensor:
    """x (d + expm1(-d)), d = log x - log y: the sum is that of x d, as both sides sum to 1, and no term is negative.

    Where expm1 could overflow, the same is computed as x d + y - x. d is passed because it can be known more exactly
    than as a difference of the logarithms.
    """
    near_TV = logx_TV.exp() * (d_TV + torch.expm1(-d_TV.clamp(min=-1.0)))
    far_TV = logx_TV.exp() * (d_TV - 1.0) + logy_TV.exp()
    return torch.where(d_TV < -1.0, far_TV, near_TV)
