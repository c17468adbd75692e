"""Draws tokens from logits with given random numbers: a draw depends on its row alone.

Axes: R rows, V vocabulary, C candidates.
"""

import torch
from torch import Tensor

from megatron_paint.rollouts.engine import SamplingParameters


def choose_tokens(logits_RV: Tensor, *, uniform_R: Tensor, sampling: SamplingParameters) -> tuple[Tensor, Tensor]:
    """Token ids [R] and their log-probabilities [R] in nats at the sampling temperature, before top-k and top-p.

    `logits_RV` is float32, over the complete vocabulary; `uniform_R` float64 in [0, 1). Top-p is applied to what
    top-k keeps, as in `transformers` and vLLM. The draw inverts the cumulative distribution in the order of token ids,
    not of probabilities: rounding then changes a draw only if the uniform number is on a boundary.
    """
    if sampling.temperature == 0:
        token_R = logits_RV.argmax(-1)
        return token_R, logits_RV.log_softmax(-1).gather(1, token_R[:, None])[:, 0]
    scaled_RV = logits_RV / sampling.temperature
    logp_RV = scaled_RV.log_softmax(-1)
    candidate_RC, kept_logp_RC = _candidates(logp_RV, sampling)
    cumulative_RC = kept_logp_RC.double().exp().cumsum(-1)
    threshold_R1 = uniform_R[:, None] * cumulative_RC[:, -1:]
    place_R1 = torch.searchsorted(cumulative_RC, threshold_R1, right=True).clamp_max(cumulative_RC.size(1) - 1)
    token_R1 = candidate_RC.gather(1, place_R1)
    return token_R1[:, 0], logp_RV.gather(1, token_R1)[:, 0]


def _candidates(logp_RV: Tensor, sampling: SamplingParameters) -> tuple[Tensor, Tensor]:
    """Ids [R, C] in ascending order and their log-probabilities, -inf where top-p drops one."""
    vocabulary = logp_RV.size(1)
    every_id_RV = torch.arange(vocabulary, device=logp_RV.device).expand_as(logp_RV)
    if sampling.top_k == 0 and sampling.top_p == 1:
        return every_id_RV, logp_RV
    count = min(sampling.top_k or vocabulary, vocabulary)
    kept_RC, id_RC = logp_RV.topk(count, dim=-1)
    kept_RC = kept_RC.double().log_softmax(-1)
    if sampling.top_p < 1:
        before_RC = kept_RC.exp().cumsum(-1) - kept_RC.exp()
        kept_RC = kept_RC.masked_fill(before_RC >= sampling.top_p, -torch.inf)
    if count == vocabulary:  # scattered to their ids: cheaper than a second sort
        return every_id_RV, torch.empty_like(kept_RC).scatter_(1, id_RC, kept_RC)
    id_RC, order_RC = id_RC.sort(-1)
    return id_RC, kept_RC.gather(1, order_RC)
