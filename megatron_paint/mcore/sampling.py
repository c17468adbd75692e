"""Draws tokens from logits with given random numbers: a draw depends on its row alone.

Axes: R rows, V vocabulary, C candidates.
"""

import torch
from torch import Tensor

from megatron_paint.mcore.nucleus import (
    GROUP,
    LARGEST,
    draw_from_blocks,
    draw_from_histogram,
    draw_from_largest,
)
from megatron_paint.rollouts.engine import SamplingParameters

ROWS_AT_ONCE = 8  # on a CPU: then what one operation writes is in the cache when the next one reads it; ours


def choose_tokens(logits_RV: Tensor, *, uniform_R: Tensor, sampling: SamplingParameters) -> tuple[Tensor, Tensor]:
    """Token ids [R] and their log-probabilities [R] in nats at the sampling temperature, before top-k and top-p.

    `logits_RV` is float32, over the complete vocabulary, and is overwritten; `uniform_R` float64 in [0, 1). Top-p is
    applied to what top-k keeps, as in `transformers` and vLLM. The draw inverts the cumulative distribution in the
    order of token ids, not of probabilities: rounding then changes a draw only if the uniform number is on a boundary.
    On a GPU nothing waits for the device.
    """
    if logits_RV.is_cuda:
        return _choose(logits_RV, uniform_R, sampling)
    parts = zip(logits_RV.split(ROWS_AT_ONCE), uniform_R.split(ROWS_AT_ONCE), strict=True)
    token_parts, logp_parts = zip(*(_choose(*part, sampling) for part in parts), strict=True)
    return torch.cat(token_parts), torch.cat(logp_parts)


def _choose(logits_RV: Tensor, uniform_R: Tensor, sampling: SamplingParameters) -> tuple[Tensor, Tensor]:
    greedy = sampling.temperature == 0
    token_R = logits_RV.argmax(-1) if greedy else None
    if not greedy and sampling.temperature != 1:
        logits_RV /= sampling.temperature
    logp_RV = torch.log_softmax(logits_RV, dim=-1, out=None if logits_RV.is_cuda else logits_RV)
    if token_R is None:
        # top-k leaves little to sort, and so does a small vocabulary. The fast draws look at their results.
        sort = sampling.top_k > 0 or logp_RV.size(1) < LARGEST * GROUP or logp_RV.is_cuda
        token_R = (draw_sorted if sort else draw_unsorted)(logp_RV, uniform_R, sampling)
    return token_R, logp_RV.gather(1, token_R[:, None])[:, 0]


def draw_unsorted(logp_RV: Tensor, uniform_R: Tensor, sampling: SamplingParameters) -> Tensor:
    """The token ids [R] that `draw_sorted` draws, without top-k, on a CPU. Few rows are sorted."""
    if sampling.top_p == 1:
        token_R, sure_R = draw_from_blocks(logp_RV.double().exp_(), uniform_R)
    else:
        token_R, sure_R = draw_from_largest(logp_RV, uniform_R, sampling.top_p)
        for row in (~sure_R).nonzero()[:, 0].tolist():
            token = draw_from_histogram(logp_RV[row], uniform_R[row], sampling.top_p)
            if token is not None:
                token_R[row], sure_R[row] = token, True
    if not sure_R.all():
        token_R[~sure_R] = draw_sorted(logp_RV[~sure_R], uniform_R[~sure_R], sampling)
    return token_R


def draw_sorted(logp_RV: Tensor, uniform_R: Tensor, sampling: SamplingParameters) -> Tensor:
    """Token ids [R]: the rule as it is written, in float64."""
    candidate_RC, kept_logp_RC = _candidates(logp_RV, sampling)
    cumulative_RC = kept_logp_RC.double().exp().cumsum(-1)
    threshold_R1 = uniform_R[:, None] * cumulative_RC[:, -1:]
    place_R1 = torch.searchsorted(cumulative_RC, threshold_R1, right=True).clamp_max(cumulative_RC.size(1) - 1)
    return candidate_RC.gather(1, place_R1)[:, 0]


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
