"""The vocabulary axis: complete in this process, or split into column ranges over a process group.

This file has every collective of the losses. Axes: T tokens, V this rank's vocabulary columns, R ranks of the group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True, kw_only=True)
class WholeVocab:
    """All columns are in this process; columns from valid_size on are a framework's padding and are ignored."""

    valid_size: int | None = None

    ranks = 1
    start = 0
    reduce_hidden_grad = False

    def __post_init__(self) -> None:
        if self.valid_size is not None and self.valid_size < 1:
            raise ValueError(f"valid_size: got {self.valid_size}; it counts vocabulary entries; pass 1 or more")

    def valid_columns(self, columns: int) -> int:
        """How many of the columns on this rank belong to the vocabulary; ValueError if that is impossible."""
        if self.valid_size is None:
            return columns
        if self.valid_size > columns:
            raise ValueError(
                f"valid_size: got {self.valid_size} for {columns} columns; it is at most their number; pass the "
                "size of the real vocabulary"
            )
        return self.valid_size

    def full_size(self, columns: int) -> int:
        """The number of entries of the real vocabulary over all ranks."""
        return self.valid_columns(columns)

    def widest(self, columns: int) -> int:
        """The largest number of columns of any rank: from it all ranks compute the same chunk sizes."""
        return columns

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """Stacks every rank's values [...] to [R, ...]; no gradient."""
        return values.unsqueeze(0)

    def sum_in_place(self, values: torch.Tensor) -> torch.Tensor:
        """Sums over ranks into values; no gradient."""
        return values

    def start_gather(self, values: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Starts gather(); calling the returned function waits for the result."""
        return lambda: self.gather(values)

    def start_sum(self, values: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Starts sum_in_place(); calling the returned function waits for the result."""
        return lambda: values

    def max_shards(self, values: torch.Tensor) -> torch.Tensor:
        """The maximum over ranks; no gradient."""
        return values.detach()

    def sum_shards(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, differentiable."""
        return values

    def to_shards(self, values: torch.Tensor) -> torch.Tensor:
        """Passes a value that is equal on all ranks to each rank's columns; its gradient is summed over ranks."""
        return values


@dataclass(frozen=True)
class ShardedVocab:
    """This rank holds columns [start, stop) of size; the other ranks of the group hold the rest.

    size counts padding columns, valid_size does not (None: no padding). All ranks of the group call the losses with the
    same tokens, lengths and settings. The differentiable methods follow one convention: the loss is equal on every
    rank, each rank calls backward on its own copy, and it counts once.
    reduce_hidden_grad: True sums the hidden states' gradient over the group inside the loss. False returns each rank's
    part to a caller that sums it anyway: the backward of a sequence-parallel gather does so with its reduce-scatter.
    """

    group: Any
    _: KW_ONLY
    start: int
    stop: int
    size: int
    valid_size: int | None = None
    reduce_hidden_grad: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop <= self.size:
            raise ValueError(
                f"vocabulary shard: got columns {self.start} to {self.stop} of {self.size}; "
                "0 <= start < stop <= size holds; pass this rank's range"
            )
        if self.valid_size is not None and not 1 <= self.valid_size <= self.size:
            raise ValueError(
                f"valid_size: got {self.valid_size}; it lies in [1, size = {self.size}]; count real entries alone"
            )

    @classmethod
    def from_columns(
        cls, group: Any, columns: int, *, valid_size: int | None = None, reduce_hidden_grad: bool = True
    ) -> ShardedVocab:
        """The axis for shards of equal width in rank order, as Megatron splits its output layer."""
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        return cls(
            group,
            start=rank * columns,
            stop=(rank + 1) * columns,
            size=ranks * columns,
            valid_size=valid_size,
            reduce_hidden_grad=reduce_hidden_grad,
        )

    @classmethod
    def evenly_cut(
        cls, group: Any, size: int, *, valid_size: int | None = None, reduce_hidden_grad: bool = True
    ) -> ShardedVocab:
        """The axis of a vocabulary of this size over all ranks of the group; ValueError if it does not divide."""
        ranks = dist.get_world_size(group)
        if size % ranks:
            raise ValueError(
                f"vocabulary: got {size} entries for {ranks} ranks; each must hold the same number; choose a number of "
                "ranks that divides it, or pad the output layer and pass the real size as valid_size"
            )
        return cls.from_columns(group, size // ranks, valid_size=valid_size, reduce_hidden_grad=reduce_hidden_grad)

    @property
    def ranks(self) -> int:
        return dist.get_world_size(self.group)

    def valid_columns(self, columns: int) -> int:
        if columns != self.stop - self.start:
            raise ValueError(
                f"vocabulary shard: got {columns} columns for the range {self.start} to {self.stop}; this rank holds "
                f"{self.stop - self.start} of {self.size}; pass this rank's slice of the output layer"
            )
        return min(max(self.full_size(columns) - self.start, 0), columns)

    def full_size(self, columns: int) -> int:
        return self.size if self.valid_size is None else self.valid_size

    def widest(self, columns: int) -> int:
        return -(-self.size // self.ranks)

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        return self.start_gather(values)()

    def sum_in_place(self, values: torch.Tensor) -> torch.Tensor:
        return self.start_sum(values)()

    def start_gather(self, values: torch.Tensor) -> Callable[[], torch.Tensor]:
        gathered = values.new_empty((self.ranks, *values.shape))
        work = dist.all_gather(list(gathered.unbind(0)), values.contiguous(), group=self.group, async_op=True)
        return lambda: _after(work, gathered)

    def start_sum(self, values: torch.Tensor) -> Callable[[], torch.Tensor]:
        work = dist.all_reduce(values, op=dist.ReduceOp.SUM, group=self.group, async_op=True)
        return lambda: _after(work, values)

    def max_shards(self, values: torch.Tensor) -> torch.Tensor:
        values = values.detach().clone()
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.group)
        return values

    def sum_shards(self, values: torch.Tensor) -> torch.Tensor:
        return _SumShards.apply(values, self.group)

    def to_shards(self, values: torch.Tensor) -> torch.Tensor:
        return _ToShards.apply(values, self.group)


VocabAxis = WholeVocab | ShardedVocab


def _after(work: Any, values: torch.Tensor) -> torch.Tensor:
    """Waits; on a GPU the current stream waits, not the host."""
    work.wait()
    return values


class _SumShards(torch.autograd.Function):
    """Sum over ranks. Every rank's summand enters the replicated loss once, so the gradient is passed unchanged."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, group: Any) -> torch.Tensor:
        total = values.clone()
        dist.all_reduce(total, op=dist.ReduceOp.SUM, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


class _ToShards(torch.autograd.Function):
    """The unchanged value. Each rank's columns contribute a part of its gradient, so the gradient is summed."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, op=dist.ReduceOp.SUM, group=ctx.group)
        return total, None
