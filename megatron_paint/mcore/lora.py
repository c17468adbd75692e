"""Low-rank adapters on all seven projections, under tensor and sequence parallelism.

Megatron fuses q, k and v into one matrix, and gate and up into another. Adapters remain one pair (A, B) per projection,
as in PEFT, so that PEFT can read them. Each fused linear layer gets a sibling module of adapters and a forward hook
that adds their output. W x becomes W x + (alpha / rank) B A x (LoRA, arXiv 2106.09685); A starts random, B zero.

Axes: T tokens of this rank, I inputs, O outputs of this rank, K rank of the adapters.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
import torch.distributed as dist
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

from megatron_paint.base.keys import derive_key
from megatron_paint.checkpoints.adapter_reader import Adapter
from megatron_paint.checkpoints.peft import adapter_name
from megatron_paint.config.settings import LoraSettings
from megatron_paint.mcore.model import Stage
from megatron_paint.mcore.ranks import Ranks
from megatron_paint.models.qwen3.mapping import part
from megatron_paint.models.shape import ModelShape


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


def add_adapters(stage: Stage, settings: LoraSettings, shape: ModelShape, ranks: Ranks, *, seed: int) -> None:
    """Freezes the stage and adds adapters to its layers; their values do not depend on the layout."""
    for parameter in stage.parameters():
        parameter.requires_grad_(False)
    q_size, kv_size = shape.num_heads * shape.head_dim, shape.num_groups * shape.head_dim
    hidden, ffn = shape.hidden_size, shape.ffn_size

    for number, layer in stage.layers.items():

        def pairs(sizes: dict[str, tuple[int, int]], split_inputs: bool, number: int = number):
            return {
                name: _start_pair(settings.rank, inputs, outputs, split_inputs, ranks, stage, (seed, number, name))
                for name, (inputs, outputs) in sizes.items()
            }

        common = {"scale": settings.alpha / settings.rank, "sequence_parallel": stage.config.sequence_parallel}
        attention, mlp = layer.self_attention, layer.mlp
        qkv_sizes = {"q_proj": (hidden, q_size), "k_proj": (hidden, kv_size), "v_proj": (hidden, kv_size)}
        attention.qkv_adapters = ColumnAdapters(
            pairs(qkv_sizes, False), groups=shape.num_groups // ranks.tp_size, **common
        )
        attention.proj_adapters = RowAdapters(pairs({"o_proj": (q_size, hidden)}, True), **common)
        mlp.fc1_adapters = ColumnAdapters(
            pairs({"gate_proj": (hidden, ffn), "up_proj": (hidden, ffn)}, False), groups=None, **common
        )
        mlp.fc2_adapters = RowAdapters(pairs({"down_proj": (ffn, hidden)}, True), **common)
        attention.linear_qkv.register_forward_hook(attention.qkv_adapters.add_to)
        attention.linear_proj.register_forward_hook(attention.proj_adapters.add_to)
        mlp.linear_fc1.register_forward_hook(mlp.fc1_adapters.add_to)
        mlp.linear_fc2.register_forward_hook(mlp.fc2_adapters.add_to)


def _start_pair(rank: int, inputs: int, outputs: int, split_inputs: bool, ranks: Ranks, stage, key: tuple):
    """This rank's part of a new pair: A uniform in +-1/sqrt(I), as in PEFT, drawn from a key; B zero."""
    generator = torch.Generator().manual_seed(derive_key("lora", *key))
    bound = 1 / math.sqrt(inputs)
    a_KI = torch.empty(rank, inputs).uniform_(-bound, bound, generator=generator)
    if split_inputs:
        a_KI = a_KI[:, part(inputs, rank=ranks.tp_rank, ranks=ranks.tp_size)].contiguous()
    else:
        outputs //= ranks.tp_size
    options = {"device": ranks.device, "dtype": stage.config.params_dtype}
    return a_KI.to(**options), torch.zeros(outputs, rank, **options)


def adapters_of(stage: Stage) -> list[Adapters]:
    """All adapters of a stage; empty without LoRA."""
    return [module for module in stage.modules() if isinstance(module, Adapters)]


_SIBLINGS = {
    "linear_qkv": "qkv_adapters",
    "linear_proj": "proj_adapters",
    "linear_fc1": "fc1_adapters",
    "linear_fc2": "fc2_adapters",
}


@torch.no_grad()
def merged_weight(stage: Stage, name: str, parameter: Tensor) -> Tensor:
    """A base parameter of the stage plus the change of its adapters, added in float32 and rounded once."""
    path = name.split(".")
    adapters = None
    if len(path) > 2 and path[-1] == "weight" and path[-2] in _SIBLINGS:
        adapters = getattr(stage.get_submodule(".".join(path[:-2])), _SIBLINGS[path[-2]], None)
    if adapters is None:
        return parameter.detach()
    return (parameter.float() + adapters.weight_change()).to(parameter.dtype)


@torch.no_grad()
def gathered_adapters(stage: Stage, ranks: Ranks) -> Iterator[tuple[str, Tensor]]:
    """Complete adapters of a stage by PEFT's names, on tensor-parallel rank 0; its ranks iterate together."""
    for weight, side, parameter in _named_adapters(stage):
        complete = _gathered(parameter, ranks)
        if complete is not None:
            yield adapter_name(weight, side), complete


def _named_adapters(stage: Stage) -> Iterator[tuple[str, str, nn.Parameter]]:
    """(Hugging Face weight, side, this rank's part) of every adapter of a stage."""
    for number, layer in stage.layers.items():
        for block, part_of in (("self_attn", layer.self_attention), ("mlp", layer.mlp)):
            for adapters in (module for module in part_of.children() if isinstance(module, Adapters)):
                for side, pairs in (("A", adapters.a), ("B", adapters.b)):
                    for projection, parameter in pairs.items():
                        yield f"model.layers.{number}.{block}.{projection}.weight", side, parameter


@torch.no_grad()
def load_adapters(stage: Stage, adapter: Adapter, ranks: Ranks) -> None:
    """Fills this rank's part of the stage's adapters. Those of projections that `adapter` leaves out stay new."""
    for weight, side, parameter in _named_adapters(stage):
        if (pair := adapter.pair(weight)) is None:
            continue
        complete = pair[0] if side == "A" else pair[1]
        if parameter.tensor_model_parallel:
            axis = parameter.partition_dim
            mine = part(complete.shape[axis], rank=ranks.tp_rank, ranks=ranks.tp_size)
            complete = complete.narrow(axis, mine.start, mine.stop - mine.start)
        parameter.copy_(complete)


def _gathered(parameter: nn.Parameter, ranks: Ranks) -> Tensor | None:
    """The complete parameter on the first tensor-parallel rank; None on the others."""
    first = ranks.tp_rank == 0
    if ranks.tp_size == 1 or not parameter.tensor_model_parallel:
        return parameter if first else None
    shards = [torch.empty_like(parameter) for _ in range(ranks.tp_size)] if first else None
    dist.gather(parameter.contiguous(), shards, group_dst=0, group=ranks.tp_group)
    return torch.cat(shards, dim=parameter.partition_dim) if first else None
