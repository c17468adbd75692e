"""Context parallelism: the ranks of a group share the tokens of every row of a micro-batch.

With C ranks a row is padded to a multiple of 2 C tokens and cut into 2 C equal pieces. Rank c has pieces c and
2 C - 1 - c. So every rank has the same number of tokens and the same work of causal attention, in each row. It is the
layout of Transformer Engine's packed (`thd`) format.

Core attention gathers the keys and values of all ranks; the gradient is summed and scattered back. The loss needs
complete responses, so each rollout has an owner: one exchange sends the hidden states of its response to that rank.
Then the loss is computed as without context parallelism, once for each token.

Axes: T tokens of the micro-batch, L = T / C tokens of this rank, R rows, S queries and K keys of a row, N response
tokens of the rollouts that this rank owns, M response tokens among the L, G key-value groups, D head size, H hidden
size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ContextGroup:
    """The context-parallel ranks of a replica."""

    group: Any
    rank: int
    size: int

    @property
    def row_multiple(self) -> int:
        """A row's tokens are padded to a multiple of it."""
        return 2 * self.size


@dataclass(frozen=True, kw_only=True)
class Piece:
    """This rank's piece of every row: its queries, and the keys up to its end, as rectangles [R, S] and [R, K]."""

    queries: int  # S
    keys: int  # K
    local_Q: Tensor  # the queries' places in L, row by row
    row_Q: Tensor
    slot_Q: Tensor
    gathered_P: Tensor  # the keys' places among the gathered slices of all ranks, row by row
    row_P: Tensor
    slot_P: Tensor
    visible_RSK: Tensor
    masks: dict[tuple[int, torch.dtype], Tensor] = field(default_factory=dict)  # `mask` makes each once

    def mask(self, heads_per_group: int, dtype: torch.dtype) -> Tensor:
        """What is added to the scores [R, 1, Q, K] of Q = S x heads_per_group queries.

        All layers share one tensor. torch would make one of a boolean mask for every layer, and keep it for the
        backward pass.
        """
        if (heads_per_group, dtype) not in self.masks:
            added_RSK = torch.zeros_like(self.visible_RSK, dtype=dtype).masked_fill_(~self.visible_RSK, -torch.inf)
            self.masks[heads_per_group, dtype] = added_RSK.repeat_interleave(heads_per_group, dim=1)[:, None]
        return self.masks[heads_per_group, dtype]


@dataclass(frozen=True, kw_only=True)
class ContextSlice:
    """The part of a micro-batch's rows that this rank has."""

    context: ContextGroup
    token_L: Tensor  # the places in T of this rank's tokens
    gathered_T: Tensor  # the place of each token of T among the gathered slices of all ranks
    pieces: tuple[Piece, Piece]

    def gather(self, key_LGD: Tensor, value_LGD: Tensor) -> Tensor:
        """Keys and values of all ranks, joined: [C L, G, 2 D]."""
        return _GatherSlices.apply(torch.cat((key_LGD, value_LGD), dim=-1), self.context.group)


def pieces_of(rank: int, size: int) -> tuple[int, int]:
    """The two pieces of every row that a rank has, of 2 x size pieces."""
    return rank, 2 * size - 1 - rank


def context_slice(lengths: Sequence[int], context: ContextGroup, *, device: torch.device) -> ContextSlice:
    """lengths: of the rows, each a multiple of `context.row_multiple`, and nothing behind them."""
    pieces, ranks = context.row_multiple, context.size
    held = torch.tensor([pieces_of(rank, ranks) for rank in range(ranks)])
    place_of_piece = held.flatten().argsort()  # a piece's place among all pieces, rank by rank
    length_R = torch.tensor(lengths, dtype=torch.int64)
    begin_R, piece_R = length_R.cumsum(0) - length_R, length_R // pieces
    row_T = torch.repeat_interleave(torch.arange(len(lengths)), length_R)
    slot_T = torch.arange(len(row_T)) - begin_R[row_T]
    piece_T = slot_T // piece_R[row_T]
    holder_T, is_second_T = place_of_piece[piece_T] // 2, place_of_piece[piece_T] % 2
    local_T = begin_R[row_T] // ranks + slot_T % piece_R[row_T] + is_second_T * piece_R[row_T]
    gathered_T = holder_T * (len(row_T) // ranks) + local_T
    token_L = gathered_T.argsort().view(ranks, -1)[context.rank]

    def piece(number: int) -> Piece:
        mine = piece_T == number
        seen = piece_T <= number
        queries, keys = int(piece_R.max()), (number + 1) * int(piece_R.max())
        last_RS = number * piece_R[:, None] + torch.arange(queries)
        return Piece(
            queries=queries,
            keys=keys,
            local_Q=local_T[mine].to(device),
            row_Q=row_T[mine].to(device),
            slot_Q=(slot_T % piece_R[row_T])[mine].to(device),
            gathered_P=gathered_T[seen].to(device),
            row_P=row_T[seen].to(device),
            slot_P=slot_T[seen].to(device),
            visible_RSK=(torch.arange(keys) <= last_RS[..., None]).to(device),
        )

    return ContextSlice(
        context=context,
        token_L=token_L.to(device),
        gathered_T=gathered_T.to(device),
        pieces=tuple(map(piece, pieces_of(context.rank, ranks))),
    )


@dataclass(frozen=True, kw_only=True)
class ResponseExchange:
    """Sends the hidden states of response tokens from the ranks that computed them to the owners of the rollouts."""

    context: ContextGroup
    sent: list[int]  # how many of this rank's M rows go to each rank
    received: list[int]
    order_M: Tensor  # this rank's rows in the order in which they are sent
    order_N: Tensor  # the received rows in the order of the rollouts

    def __call__(self, rows_MH: Tensor) -> Tensor:
        """Rows [N, H] of the rollouts that this rank owns. All ranks of the group call together."""
        arrived_NH = _Exchange.apply(rows_MH[self.order_M], self.sent, self.received, self.context.group)
        return arrived_NH[self.order_N]


def response_exchange(
    predicting: Tensor, owner: Tensor, gathered_T: Tensor, context: ContextGroup, *, device: torch.device
) -> tuple[Tensor, ResponseExchange]:
    """This rank's ascending places in L of the M response tokens that it has, and their exchange.

    predicting: places in T of the response tokens of all rollouts; owner: the rank that gets each. Both are on the CPU.
    """
    slice_tokens = len(gathered_T) // context.size
    gathered = gathered_T.cpu()[predicting]
    holder, local = gathered // slice_tokens, gathered % slice_tokens
    by_place = local.argsort()  # each rank sends in the order of its places
    held = by_place[holder[by_place] == context.rank]
    owned = owner == context.rank
    arriving = torch.cat([by_place[(holder[by_place] == rank) & owned[by_place]] for rank in range(context.size)])
    exchange = ResponseExchange(
        context=context,
        sent=torch.bincount(owner[held], minlength=context.size).tolist(),
        received=torch.bincount(holder[owned], minlength=context.size).tolist(),
        order_M=owner[held].argsort(stable=True).to(device),
        order_N=arriving.argsort().to(device),
    )
    return local[held].to(device), exchange


class _GatherSlices(torch.autograd.Function):
    """[L, ...] -> [C L, ...] of all ranks. backward: the sum of the ranks' gradients, each rank's slice of it."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor, group: Any) -> Tensor:
        ctx.group = group
        gathered = mine.new_empty((dist.get_world_size(group) * len(mine), *mine.shape[1:]))
        dist.all_gather_into_tensor(gathered, mine.contiguous(), group=group)
        return gathered

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        mine = grad.new_empty((len(grad) // dist.get_world_size(ctx.group), *grad.shape[1:]))
        dist.reduce_scatter_tensor(mine, grad.contiguous(), group=ctx.group)
        return mine, None


class _Exchange(torch.autograd.Function):
    """Rows to other ranks; backward sends their gradients back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _all_to_all(rows, sent, received, group)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(grad, ctx.received, ctx.sent, ctx.group), None, None, None


def _all_to_all(rows: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
    arrived = rows.new_empty((sum(received), rows.shape[1]))
    dist.all_to_all_single(arrived, rows.contiguous(), received, sent, group=group)
    return arrived
