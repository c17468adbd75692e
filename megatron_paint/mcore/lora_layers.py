"""The adapters of Megatron's column-parallel and row-parallel linear layers.

Axes: T tokens of this rank, I inputs, O outputs of this rank, K rank of the adapters.
"""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn


class Adapters(nn.Module, ABC):
    """The adapters of one linear layer; with `enabled` False the layer computes as without adapters."""

    def __init__(self, projections: dict[str, tuple[Tensor, Tensor]], *, scale: float, sequence_parallel: bool):
        """`projections`: name -> (A [K, I], B [O, K]), this rank's parts."""
        super().__init__()
        self.scale = scale
        self.sequence_parallel = sequence_parallel
        self.enabled = True
        self.a, self.b = nn.ParameterDict(), nn.ParameterDict()
        for name, (a_KI, b_OK) in projections.items():  # one by one: from a dict, ParameterDict would sort the keys
            self.a[name], self.b[name] = nn.Parameter(a_KI), nn.Parameter(b_OK)
            self._mark(self.a[name], self.b[name])

    @abstractmethod
    def _mark(self, a_KI: nn.Parameter, b_OK: nn.Parameter) -> None:
        """Marks for Megatron which of the two is a shard, and which gradient it must sum over tensor-parallel ranks."""

    def add_to(self, module: nn.Module, inputs: tuple, output: tuple) -> tuple | None:
        """Forward hook of the linear layer."""
        if not self.enabled:
            return None
        value, bias = output
        return value + self.scale * self(inputs[0]), bias

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        state = self.state_dict(prefix="", keep_vars=True)
        axes = {n: p.partition_dim for n, p in self.named_parameters() if p.tensor_model_parallel}
        return make_sharded_tensors_for_checkpoint(state, prefix, axes, sharded_offsets)


class ColumnAdapters(Adapters):
    """Adapters of a column-parallel layer: A is replicated, B is split by outputs."""

    def __init__(self, projections, *, groups: int | None, **kwargs):
        super().__init__(projections, **kwargs)
        self.groups = groups  # key-value groups of this rank where the outputs interleave by them (q, k, v)

    def _mark(self, a_KI, b_OK):
        # Under sequence parallelism each rank sees some of the tokens: Megatron sums such gradients over the ranks.
        a_KI.sequence_parallel = self.sequence_parallel
        set_tensor_model_parallel_attributes(a_KI, is_parallel=False, dim=-1, stride=1)
        set_tensor_model_parallel_attributes(b_OK, is_parallel=True, dim=0, stride=1)

    def forward(self, x_T1I: Tensor) -> Tensor:
        """Unscaled output of all projections in the fused layout: [T, 1, O]."""
        low_T1K = F.linear(x_T1I, torch.cat(list(self.a.values())))
        if self.sequence_parallel:
            low_T1K = gather_from_sequence_parallel_region(low_T1K, tensor_parallel_output_grad=True)
        else:
            low_T1K = copy_to_tensor_model_parallel_region(low_T1K)
        lows = low_T1K.chunk(len(self.b), dim=-1)
        return self._fuse([F.linear(low, b_OK) for low, b_OK in zip(lows, self.b.values(), strict=True)])

    def _fuse(self, outputs: list[Tensor]) -> Tensor:
        if self.groups is None:
            return torch.cat(outputs, dim=-1)
        return torch.cat([out.unflatten(-1, (self.groups, -1)) for out in outputs], dim=-1).flatten(-2)

    def weight_change(self) -> Tensor:
        """[O, I]: the adapters' change of this rank's fused weight."""
        names = list(self.a)
        return self.scale * self._fuse([F.linear(self.a[n].float().t(), self.b[n].float()) for n in names]).t()


class RowAdapters(Adapters):
    """Adapters of a row-parallel layer: A is split by inputs, B is replicated."""

    def _mark(self, a_KI, b_OK):
        b_OK.sequence_parallel = self.sequence_parallel
        set_tensor_model_parallel_attributes(a_KI, is_parallel=True, dim=1, stride=1)
        set_tensor_model_parallel_attributes(b_OK, is_parallel=False, dim=-1, stride=1)

    def forward(self, x_T1I: Tensor) -> Tensor:
        """Unscaled output: [T, 1, O]."""
        ((_, a_KI),), ((_, b_OK),) = self.a.items(), self.b.items()
        low_T1K = F.linear(x_T1I, a_KI)
        if self.sequence_parallel:
            low_T1K = reduce_scatter_to_sequence_parallel_region(low_T1K)
        else:
            low_T1K = reduce_from_tensor_model_parallel_region(low_T1K)
        return F.linear(low_T1K, b_OK)

    def weight_change(self) -> Tensor:
        """[O, I]: the adapters' change of this rank's weight."""
        ((_, a_KI),), ((_, b_OK),) = self.a.items(), self.b.items()
        return self.scale * (b_OK.float() @ a_KI.float())
