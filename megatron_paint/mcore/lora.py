"""Low-rank adapters on all seven projections, under tensor and sequence parallelism.

Of a mixture of experts, those on the attention's four, and on the experts if asked for (`expert_lora.py`).

Megatron fuses q, k and v into one matrix, and gate and up into another. Adapters remain one pair (A, B) per projection,
as in PEFT, so that PEFT can read them. Each fused linear layer gets a sibling module of adapters and a forward hook
that adds their output. W x becomes W x + (alpha / rank) B A x (LoRA, arXiv 2106.09685); A starts random, B zero.

Axes: T tokens of this rank, I inputs, O outputs of this rank, K rank of the adapters.
"""

import math
import re
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_paint.base.keys import derive_key
from megatron_paint.checkpoints.adapter_reader import Adapter
from megatron_paint.checkpoints.peft import adapter_name
from megatron_paint.checkpoints.stacked_adapters import packed, stacked_key
from megatron_paint.config.settings import LoraSettings
from megatron_paint.mcore.expert_lora import LINEAR, ExpertAdapters, new_expert_adapters
from megatron_paint.mcore.lora_layers import Adapters, ColumnAdapters, RowAdapters
from megatron_paint.mcore.model import Stage
from megatron_paint.mcore.ranks import Ranks
from megatron_paint.models.qwen3.mapping import part
from megatron_paint.models.shape import ModelShape


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
        attention.linear_qkv.register_forward_hook(attention.qkv_adapters.add_to)
        attention.linear_proj.register_forward_hook(attention.proj_adapters.add_to)
        if shape.num_experts:
            if settings.experts:
                mlp.expert_adapters = new_expert_adapters(
                    shape,
                    ranks,
                    rank=settings.rank,
                    scale=common["scale"],
                    key=(seed, number),
                    dtype=stage.config.params_dtype,
                )
                mlp.expert_adapters.attach(mlp.experts)
            continue
        mlp.fc1_adapters = ColumnAdapters(
            pairs({"gate_proj": (hidden, ffn), "up_proj": (hidden, ffn)}, False), groups=None, **common
        )
        mlp.fc2_adapters = RowAdapters(pairs({"down_proj": (ffn, hidden)}, True), **common)
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


_EXPERT = re.compile(
    r"(?P<mlp>.*\.mlp)\.experts\.(?:local_experts\.(?P<local>\d+)\.(?P<one>linear_fc[12])\.weight"
    r"|(?P<many>linear_fc[12])\.weight(?P<grouped>\d+))"
)


@torch.no_grad()
def merged_weight(stage: Stage, name: str, parameter: Tensor) -> Tensor:
    """A base parameter of the stage plus the change of its adapters, added in float32 and rounded once."""
    path = name.split(".")
    adapters, change = None, None
    if expert := _EXPERT.fullmatch(name):
        adapters = getattr(stage.get_submodule(expert["mlp"]), "expert_adapters", None)
        linear, number = expert["one"] or expert["many"], int(expert["local"] or expert["grouped"] or 0)
        if adapters is not None:
            change = adapters.weight_change(next(p for p, of in LINEAR.items() if of == linear), number)
    elif len(path) > 2 and path[-1] == "weight" and path[-2] in _SIBLINGS:
        adapters = getattr(stage.get_submodule(".".join(path[:-2])), _SIBLINGS[path[-2]], None)
        change = None if adapters is None else adapters.weight_change()
    return parameter.detach() if change is None else (parameter.float() + change).to(parameter.dtype)


@torch.no_grad()
def gathered_adapters(stage: Stage, ranks: Ranks) -> Iterator[tuple[str, Tensor]]:
    """Complete adapters of a stage by PEFT's names, on its first rank; all its ranks iterate together."""
    if ranks.dp_cp_rank == 0:
        for weight, side, parameter in _named_adapters(stage):
            complete = _gathered(parameter, ranks)
            if complete is not None:
                yield adapter_name(weight, side), complete
    if ranks.expert_shards.replica == 0:
        for layer, stacked, side, parameter in named_expert_adapters(stage):
            parts = [parameter]
            first = dist.get_rank(ranks.expert_group) == 0
            if ranks.ep_size > 1:
                parts = [torch.empty_like(parameter) for _ in range(ranks.ep_size)] if first else None
                dist.gather(parameter.contiguous(), parts, group_dst=0, group=ranks.expert_group)
            if first:
                yield stacked_key(layer, stacked, side), packed(side, torch.cat(parts))


def _named_adapters(stage: Stage) -> Iterator[tuple[str, str, nn.Parameter]]:
    """(Hugging Face weight, side, this rank's part) of every adapter of a stage, without experts."""
    for number, layer in stage.layers.items():
        for block, part_of in (("self_attn", layer.self_attention), ("mlp", layer.mlp)):
            for adapters in (module for module in part_of.children() if isinstance(module, Adapters)):
                if isinstance(adapters, ExpertAdapters):
                    continue
                for side, pairs in (("A", adapters.a), ("B", adapters.b)):
                    for projection, parameter in pairs.items():
                        yield f"model.layers.{number}.{block}.{projection}.weight", side, parameter


def named_expert_adapters(stage: Stage) -> Iterator[tuple[int, str, str, nn.Parameter]]:
    """(layer from 0, stacked projection, side, that of this rank's experts) of every adapter of experts of a stage."""
    for number, layer in stage.layers.items():
        if (adapters := getattr(layer.mlp, "expert_adapters", None)) is not None:
            for side, pairs in (("A", adapters.a), ("B", adapters.b)):
                for stacked, parameter in pairs.items():
                    yield number, stacked, side, parameter


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
    for layer, stacked, side, parameter in named_expert_adapters(stage):
        if (pair := adapter.expert_pairs(layer, stacked)) is not None:
            first = ranks.ep_rank * len(parameter)
            parameter.copy_(pair["AB".index(side)][first : first + len(parameter)])


def _gathered(parameter: nn.Parameter, ranks: Ranks) -> Tensor | None:
    """The complete parameter on the first tensor-parallel rank; None on the others."""
    first = ranks.tp_rank == 0
    if ranks.tp_size == 1 or not parameter.tensor_model_parallel:
        return parameter if first else None
    shards = [torch.empty_like(parameter) for _ in range(ranks.tp_size)] if first else None
    dist.gather(parameter.contiguous(), shards, group_dst=0, group=ranks.tp_group)
    return torch.cat(shards, dim=parameter.partition_dim) if first else None
