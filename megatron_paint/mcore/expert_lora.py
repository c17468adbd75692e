"""Low-rank adapters on the experts of a mixture: a pair (A, B) for each of the two matrices of each expert.

PEFT and `transformers` 5 have gate and up of an expert as one matrix, so they share one pair. A rank has the complete
pairs of its experts, stacked. The router stays as it is.

Axes: E experts of this rank, T tokens of an expert, I inputs, O outputs, K rank of the adapters.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor, nn

from megatron_paint.base.keys import derive_key
from megatron_paint.mcore.lora_layers import Adapters
from megatron_paint.mcore.model import mark_expert
from megatron_paint.mcore.ranks import Ranks
from megatron_paint.models.shape import ModelShape

LINEAR = {"gate_up_proj": "linear_fc1", "down_proj": "linear_fc2"}  # Megatron's layer of a stacked projection


class ExpertAdapters(Adapters):
    """The adapters of the experts of one layer that this rank has; `projections`: A [E, K, I], B [E, O, K]."""

    def __init__(self, projections: dict[str, tuple[Tensor, Tensor]], *, scale: float, ranks: Ranks) -> None:
        super().__init__(projections, scale=scale, sequence_parallel=False)
        self._parts = ranks.ep_rank, ranks.ep_size
        self._replica = ranks.expert_shards.replica

    def _mark(self, a_EKI: nn.Parameter, b_EOK: nn.Parameter) -> None:
        for parameter in (a_EKI, b_EOK):
            mark_expert(parameter, dim=0)

    def attach(self, experts: nn.Module) -> None:
        """Adds the adapters' output to the linear layers: of each expert, or of all experts together (grouped)."""
        single = getattr(experts, "local_experts", None)
        for projection, linear in LINEAR.items():
            if single is None:
                getattr(experts, linear).register_forward_hook(partial(self._add_grouped, projection))
                continue
            for number, expert in enumerate(single):
                getattr(expert, linear).register_forward_hook(partial(self._add_single, projection, number))

    def _add_single(self, projection: str, number: int, module: nn.Module, inputs: tuple, output: tuple):
        if not self.enabled:
            return None
        value, bias = output
        return value + self.scale * self._of(projection, number, inputs[0]), bias

    def _add_grouped(self, projection: str, module: nn.Module, inputs: tuple, output: tuple):
        """Inputs: tokens, one expert's after another's, and how many each expert has."""
        if not self.enabled:
            return None
        (tokens, counts), (value, bias) = inputs[:2], output
        parts: Sequence[Tensor] = tokens.split([int(count) for count in counts])
        return value + self.scale * torch.cat([self._of(projection, e, part) for e, part in enumerate(parts)]), bias

    def _of(self, projection: str, number: int, x_TI: Tensor) -> Tensor:
        """Unscaled output [T, O] of an expert's adapters."""
        return F.linear(F.linear(x_TI, self.a[projection][number]), self.b[projection][number])

    def weight_change(self, projection: str, number: int) -> Tensor:
        """[O, I]: the adapters' change of a matrix of one of this rank's experts."""
        return self.scale * (self.b[projection][number].float() @ self.a[projection][number].float())

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """Experts are an axis behind the layers', cut over the expert-parallel ranks."""
        axes = len(sharded_offsets)
        return {
            f"{prefix}{name}": ShardedTensor.from_rank_offsets(
                f"{prefix}{name}",
                parameter,
                *sharded_offsets,
                (axes, *self._parts),
                replica_id=(0, 0, self._replica),
                prepend_axis_num=axes,
            )
            for name, parameter in self.named_parameters()
        }


def new_expert_adapters(
    shape: ModelShape, ranks: Ranks, *, rank: int, scale: float, key: tuple[int, int], dtype: torch.dtype
) -> ExpertAdapters:
    """New adapters of a layer: A uniform in +-1/sqrt(I), as in PEFT, drawn from a key of each expert; B zero.

    key: seed, and the layer's number from 0.
    """
    hidden, ffn = shape.hidden_size, shape.expert_ffn_size
    first, count = ranks.first_expert(shape.num_experts), shape.num_experts // ranks.ep_size
    pairs = {}
    for projection, (inputs, outputs) in {"gate_up_proj": (hidden, 2 * ffn), "down_proj": (ffn, hidden)}.items():
        a_EKI = torch.empty(count, rank, inputs)
        for number, a_KI in enumerate(a_EKI):
            generator = torch.Generator().manual_seed(derive_key("lora", *key, projection, first + number))
            a_KI.uniform_(-1 / math.sqrt(inputs), 1 / math.sqrt(inputs), generator=generator)
        b_EOK = torch.zeros(count, outputs, rank)
        pairs[projection] = tuple(value.to(ranks.device, dtype) for value in (a_EKI, b_EOK))
    return ExpertAdapters(pairs, scale=scale, ranks=ranks)
