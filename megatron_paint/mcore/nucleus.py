"""Draws on a CPU, without sorting the vocabulary, the tokens that the rule of `sampling` draws.

The rule sorts a row and sums it in float64. The draws here sum in another order, so they differ from the rule's by the
rounding of those sums. A draw is *sure* if no difference of that size can change the token. Callers apply the rule
itself to the rows that are not sure. There are two ways, each for what it is fast at:

1. `draw_from_largest`: a trained model's nucleus has few tokens, so the largest entries of a row contain it.
2. `draw_from_histogram`: for a flat row, a histogram finds the entries around the end of the nucleus.

Axes: R rows, V vocabulary, G groups of entries, S entries of a group, C candidates, B bins, L blocks, E entries of a
block. Log-probabilities are float32, everything summed is float64.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

ROUNDING = 1e-10  # of a sum of 2^18 float64 numbers above 0, in any order: at most 2^18 x 2^-53 = 3e-11 of the sum
REST_ROUNDING = 1e-5  # of a float32 sum of float32 exponentials; torch sums in a cascade
LARGEST, GROUP = 512, 16  # ours: 1,024 largest entries take 1.4 times as long to find
BINS, BINS_A_NAT = 4096, 128  # ours: 32 nats below the maximum; a flat row has 1,500 of 151,936 entries in a bin
BLOCK = 128  # entries that a draw sums before it looks closer


def draw_from_largest(logp_RV: Tensor, uniform_R: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Token ids [R], and whether each is sure. V is at least LARGEST x GROUP.

    It is not sure if the nucleus is larger than LARGEST, or ends within equal entries.
    """
    value_RC, id_RC = _largest(logp_RV)
    p_RC = value_RC.double().exp()
    rest_R1 = logp_RV.exp().scatter_(1, id_RC, 0.0).sum(-1, keepdim=True).double()
    cumulative_RC = p_RC.cumsum(-1)
    total_R1 = cumulative_RC[:, -1:] + rest_R1
    limit_R1, margin_R1 = top_p * total_R1, ROUNDING * total_R1 + REST_ROUNDING * rest_R1
    kept_R1 = (cumulative_RC - p_RC < limit_R1).sum(-1, keepdim=True)
    last_R1 = (kept_R1 - 1).clamp_min(0)
    end_R1 = cumulative_RC.gather(1, last_R1)
    sure_R1 = end_R1 - p_RC.gather(1, last_R1) < limit_R1 - margin_R1
    sure_R1 &= end_R1 > limit_R1 + margin_R1
    next_R1 = kept_R1.clamp_max(LARGEST - 1)
    sure_R1 &= value_RC.gather(1, last_R1) > value_RC.gather(1, next_R1)
    id_RC, order_RC = id_RC.sort(-1)
    kept_RC = torch.where(order_RC < kept_R1, p_RC.gather(1, order_RC), 0.0)
    place_R1, drawn_R1 = _draw(kept_RC, uniform_R[:, None])
    return id_RC.gather(1, place_R1)[:, 0], (sure_R1 & drawn_R1)[:, 0]


def draw_from_histogram(logp_V: Tensor, uniform: Tensor, top_p: float) -> int | None:
    """The token id of one row; None if it is not sure."""
    greatest = logp_V.max()
    if not greatest.isfinite():
        return None
    p_V = logp_V.double().exp_()
    bin_V = (greatest - logp_V).mul_(BINS_A_NAT).clamp_max_(BINS - 1).long()
    cumulative_B = torch.bincount(bin_V, weights=p_V, minlength=BINS).cumsum(0)
    limit, margin = top_p * cumulative_B[-1], ROUNDING * cumulative_B[-1]
    last_bin = int(torch.searchsorted(cumulative_B, limit).clamp_max(BINS - 1))
    value_C = logp_V[bin_V == last_bin].sort(descending=True).values
    p_C = value_C.double().exp()
    end_C = p_C.cumsum(0) + (cumulative_B[last_bin - 1] if last_bin else 0.0)
    kept = int((end_C - p_C < limit).sum())
    if not kept or end_C[kept - 1] - p_C[kept - 1] >= limit - margin or end_C[kept - 1] <= limit + margin:
        return None
    smallest = value_C[kept - 1]
    dropped = int((value_C >= smallest).sum()) - kept  # equal to the smallest entry that is kept
    p_V *= logp_V >= smallest
    if not dropped:
        return _token(p_V, uniform)
    # Which of the equal entries a sort puts first is not defined. All choices draw the token that the two extremes draw
    # if both draw the same.
    equal = (logp_V == smallest).nonzero()[:, 0]
    first_V = p_V.index_fill(0, equal[len(equal) - dropped :], 0.0)
    first = _token(first_V, uniform)
    return first if first == _token(p_V.index_fill_(0, equal[:dropped], 0.0), uniform) else None


def draw_from_blocks(p_RV: Tensor, uniform_R: Tensor) -> tuple[Tensor, Tensor]:
    """Ids [R] drawn in proportion to p_RV in the order of ids, and whether each is sure."""
    missing = -p_RV.size(1) % BLOCK
    p_RLE = (F.pad(p_RV, (0, missing)) if missing else p_RV).unflatten(1, (-1, BLOCK))  # padding by 0 would copy
    sum_RL = p_RLE @ p_RLE.new_ones(BLOCK)
    cumulative_RL = sum_RL.cumsum(-1)
    threshold_R1 = uniform_R[:, None] * cumulative_RL[:, -1:]
    block_R1 = torch.searchsorted(cumulative_RL, threshold_R1, right=True).clamp_max(sum_RL.size(1) - 1)
    before_R1 = cumulative_RL.gather(1, block_R1) - sum_RL.gather(1, block_R1)
    p_RE = p_RLE.gather(1, block_R1[..., None].expand(-1, -1, BLOCK))[:, 0]
    place_R1, sure_R1 = _place(p_RE, threshold_R1, before_R1, ROUNDING * cumulative_RL[:, -1:])
    return (block_R1 * BLOCK + place_R1)[:, 0], sure_R1[:, 0]


def _largest(logp_RV: Tensor) -> tuple[Tensor, Tensor]:
    """The LARGEST largest entries [R, C] in descending order, and their ids.

    They are in the groups of the LARGEST largest maxima. A group has every G-th entry, which makes the maximum a
    maximum of contiguous slices.
    """
    groups = logp_RV.size(1) // GROUP
    logp_RSG = logp_RV[:, : groups * GROUP].unflatten(1, (GROUP, groups))
    group_RC = logp_RSG.amax(1).topk(LARGEST, dim=-1, sorted=False).indices
    value_RSC = logp_RSG.gather(2, group_RC[:, None].expand(-1, GROUP, -1))
    id_RSC = group_RC[:, None] + groups * torch.arange(GROUP)[:, None]
    rest_id = torch.arange(groups * GROUP, logp_RV.size(1)).expand(len(logp_RV), -1)
    value_RC = torch.cat((value_RSC.flatten(1), logp_RV[:, groups * GROUP :]), dim=1)
    value_RC, place_RC = value_RC.topk(LARGEST, dim=-1)
    return value_RC, torch.cat((id_RSC.flatten(1), rest_id), dim=1).gather(1, place_RC)


def _token(p_V: Tensor, uniform: Tensor) -> int | None:
    token_1, sure_1 = draw_from_blocks(p_V[None], uniform[None])
    return int(token_1) if sure_1 else None


def _draw(p_RC: Tensor, uniform_R1: Tensor) -> tuple[Tensor, Tensor]:
    """Places [R, 1] drawn in proportion to p_RC, and whether each is sure."""
    total_R1 = p_RC.sum(-1, keepdim=True)
    return _place(p_RC, uniform_R1 * total_R1, torch.zeros_like(total_R1), ROUNDING * total_R1)


def _place(p_RC: Tensor, threshold_R1: Tensor, before_R1: Tensor, margin_R1: Tensor) -> tuple[Tensor, Tensor]:
    """Where the sum, which begins with `before_R1`, passes the threshold; and whether by more than the margin."""
    cumulative_RC = p_RC.cumsum(-1) + before_R1
    place_R1 = torch.searchsorted(cumulative_RC, threshold_R1, right=True).clamp_max(p_RC.size(1) - 1)
    end_R1 = cumulative_RC.gather(1, place_R1)
    sure_R1 = end_R1 - threshold_R1 > margin_R1
    return place_R1, sure_R1 & (threshold_R1 - (end_R1 - p_RC.gather(1, place_R1)) > margin_R1)
