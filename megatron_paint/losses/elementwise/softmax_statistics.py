"""Softmax statistics of a chunk: each rank's, from its columns, and those of all ranks merged.

Logits in this file are divided by the temperature.
Axes: T tokens, V this rank's vocabulary columns, R ranks, K packed statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from megatron_paint.losses.output_layer.chunks import Scratch, tiles

# The maximum over no columns at all: finite, so that no difference of infinities appears.
EMPTY_MAX = -1e30


class Softmax(NamedTuple):
    """The normaliser of a softmax per token: maximum and sum of exp(logit - maximum).

    They stay separate because log(sum) + maximum would round.
    """

    max_T: torch.Tensor
    sum_T: torch.Tensor


class TokenQuery(NamedTuple):
    """Tokens whose log-probability is wanted: their columns on this rank (clamped), and whether this rank has them.

    ratio: the loss temperature divided by the temperature of the log-probability.
    """

    column_T: torch.Tensor
    here_T: torch.Tensor
    ratio: float


def query_tokens(token_ids_T: torch.Tensor, *, start: int, columns: int, ratio: float) -> TokenQuery:
    """Finds the ids [T] among columns [start, start + columns)."""
    column_T = token_ids_T.long() - start
    here_T = (column_T >= 0) & (column_T < columns)
    return TokenQuery(column_T.clamp(0, max(columns - 1, 0)), here_T, ratio)


def centred_statistics(
    logits_TV: torch.Tensor,
    elements: int,
    scratch: Scratch,
    *,
    visit: Callable[[slice, slice, torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """[T, 3] of this rank's columns: maximum m, sum of exp(z - m), sum of exp(z - m) (z - m); replaces z by z - m.

    The last sum is for the entropy: no two large sums are subtracted. visit: called with rows, columns and exp(z - m)
    of each tile, which it must not change.
    """
    local_TK = logits_TV.new_zeros((len(logits_TV), 3))
    if not logits_TV.shape[1]:
        local_TK[:, 0] = EMPTY_MAX
        return local_TK
    last = None
    for rows, columns in tiles(logits_TV, elements):
        if rows != last:
            local_TK[rows, 0], last = logits_TV[rows].amax(1), rows
        centred_TV = logits_TV[rows, columns].sub_(local_TK[rows, :1])
        exp_TV = torch.exp(centred_TV, out=scratch.like(centred_TV))
        local_TK[rows, 1] += exp_TV.sum(1)
        if visit is not None:
            visit(rows, columns, exp_TV)
        local_TK[rows, 2] += exp_TV.mul_(centred_TV).sum(1)
    return local_TK


def token_statistics(logits_TV: torch.Tensor, query: TokenQuery, elements: int) -> torch.Tensor:
    """[T, 2]: the token's logit, 0 if another rank has it; the sum of exp(ratio (z - m)), 0 if ratio is 1."""
    local_TK = logits_TV.new_zeros((len(logits_TV), 2))
    if not logits_TV.shape[1]:
        return local_TK
    local_TK[:, 0] = token_logits(logits_TV, query)
    if query.ratio != 1.0:
        max_T1 = logits_TV.amax(1, keepdim=True)
        for rows, columns in tiles(logits_TV, elements):
            centred_TV = logits_TV[rows, columns] - max_T1[rows]
            local_TK[rows, 1] += centred_TV.mul_(query.ratio).exp_().sum(1)
    return local_TK


def token_logits(logits_TV: torch.Tensor, query: TokenQuery) -> torch.Tensor:
    """The tokens' logits [T], 0 if another rank has the token."""
    logit_T = logits_TV.gather(1, query.column_T.unsqueeze(1)).squeeze(1)
    return torch.where(query.here_T, logit_T, 0.0)


def merge_softmax(max_RT: torch.Tensor, sum_RT: torch.Tensor, ratio: float = 1.0) -> Softmax:
    """One normaliser [T] from all ranks' parts.

    max_RT: maximum m of a rank's logits z. sum_RT: its sum of exp(ratio (z - m)). The result has the maximum of all z,
    not multiplied by ratio, and the sum for that maximum.
    """
    max_T = max_RT.amax(0)
    return Softmax(max_T, (sum_RT * ((max_RT - max_T) * ratio).exp()).sum(0))


def merge_entropy(parts_RTK: torch.Tensor, total: Softmax) -> torch.Tensor:
    """The entropy [T] in nats from all ranks' centred_statistics [R, T, 3]."""
    max_RT, sum_RT, weighted_RT = parts_RTK.unbind(-1)
    shift_RT = max_RT - total.max_T
    weighted_T = (shift_RT.exp() * (weighted_RT + shift_RT * sum_RT)).sum(0)
    return total.sum_T.log() - weighted_T / total.sum_T


def merge_token_logp(parts_RTK: torch.Tensor, max_RT: torch.Tensor, student: Softmax, ratio: float) -> torch.Tensor:
    """The log-probability [T] from all ranks' token_statistics [R, T, 2] and the student's local maxima."""
    total = student if ratio == 1.0 else merge_softmax(max_RT, parts_RTK[..., 1], ratio)
    return (parts_RTK[..., 0].sum(0) - total.max_T) * ratio - total.sum_T.log()
