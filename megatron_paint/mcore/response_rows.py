"""Gathers the hidden states that predict response tokens onto every tensor-parallel rank.

Under sequence parallelism each rank holds a slice of the tokens. Only response rows are sent, padded to the longest
rank's part. Prompts and solutions, often most of a micro-batch, are not sent.
Axes: T tokens of a micro-batch, N response tokens of it, L tokens of a rank's slice, H hidden size.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def response_rows(hidden_L1H: Tensor, predicting_N: Tensor, group: Any | None) -> Tensor:
    """Rows [N, H] at the ascending positions predicting_N of T. group: the ranks that hold slices; None: L is T.

    backward sums the ranks' gradients and returns each rank's slice of the sum.
    """
    if group is None:
        return hidden_L1H[predicting_N, 0]
    return _GatherRows.apply(hidden_L1H, predicting_N, group)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_L1H: Tensor, predicting_N: Tensor, group: Any) -> Tensor:
        ranks, rank, length = dist.get_world_size(group), dist.get_rank(group), len(hidden_L1H)
        owner_N = predicting_N // length
        counts = torch.bincount(owner_N, minlength=ranks)
        most = int(counts.max())
        ctx.group, ctx.shape, ctx.most = group, hidden_L1H.shape, most
        first_N = (counts.cumsum(0) - counts)[owner_N]
        ctx.place_N = owner_N * most + torch.arange(len(predicting_N), device=predicting_N.device) - first_N
        ctx.mine = predicting_N[owner_N == rank] - rank * length
        sent_MH = hidden_L1H.new_zeros((most, hidden_L1H.shape[-1]))
        sent_MH[: len(ctx.mine)] = hidden_L1H[ctx.mine, 0]
        gathered = sent_MH.new_empty((ranks * most, sent_MH.shape[1]))
        if most:
            dist.all_gather_into_tensor(gathered, sent_MH, group=group)
        return gathered[ctx.place_N]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_NH: Tensor) -> tuple[Tensor, None, None]:
        grad_L1H = grad_NH.new_zeros(ctx.shape)
        if ctx.most:
            spread = grad_NH.new_zeros((dist.get_world_size(ctx.group) * ctx.most, grad_NH.shape[1]))
            spread[ctx.place_N] = grad_NH
            mine_MH = grad_NH.new_empty((ctx.most, grad_NH.shape[1]))
            dist.reduce_scatter_tensor(mine_MH, spread, group=ctx.group)
            grad_L1H[ctx.mine, 0] = mine_MH[: len(ctx.mine)]
        return grad_L1H, None, None
