"""The table between Qwen3's tensors in Hugging Face checkpoints and Megatron-Core's parameters. There is no other one.

Every Megatron parameter consists of runs of rows of Hugging Face tensors. One list of runs describes both directions,
any slice of either side, and the part of each tensor-parallel rank. The table knows the names of both kinds of layer:
Megatron's local layers, and Transformer Engine's, which fuse norms into the linear layers.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_paint.models.shape import ModelShape

Read = Callable[..., Tensor]  # read(name, rows=slice, columns=slice | None) returns that part of the tensor


def part(size: int, *, rank: int, ranks: int) -> slice:
    """Returns the contiguous part of `size` entries that belongs to `rank`."""
    return slice(rank * size // ranks, (rank + 1) * size // ranks)


@dataclass(frozen=True)
class Segment:
    """A run of rows: rows source to source + rows of the tensor `name` are rows row to row + rows of Megatron's."""

    name: str  # of the Hugging Face tensor
    source: int  # first row in the Hugging Face tensor
    row: int  # first row in Megatron's parameter
    rows: int  # number of rows


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How one Megatron parameter consists of rows of Hugging Face tensors, and how tensor-parallel ranks share it.

    split: none (every rank has all rows), rows, columns, or halves. With halves a rank has a part of the first half of
    the rows and then the same part of the second half. This is not one slice of the parameter.
    """

    shape: tuple[int, ...]  # of the complete parameter: (rows,) or (rows, columns)
    segments: tuple[Segment, ...]  # in the order of Megatron's rows, without gaps
    split: Literal["none", "rows", "columns", "halves"]

    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the complete shapes of the Hugging Face tensors, by name."""
        rows: dict[str, int] = {}
        for segment in self.segments:
            rows[segment.name] = rows.get(segment.name, 0) + segment.rows
        return {name: (count, *self.shape[1:]) for name, count in rows.items()}

    def shard_rows(self, *, rank: int, ranks: int) -> tuple[slice, ...]:
        """Returns the rows of a tensor-parallel rank."""
        rows = self.shape[0]
        if self.split == "rows":
            return (part(rows, rank=rank, ranks=ranks),)
        if self.split == "halves":
            half = part(rows // 2, rank=rank, ranks=ranks)
            return half, slice(half.start + rows // 2, half.stop + rows // 2)
        return (slice(0, rows),)

    def shard_columns(self, *, rank: int, ranks: int) -> slice | None:
        """Returns the columns of a tensor-parallel rank; None if it has all columns."""
        return part(self.shape[1], rank=rank, ranks=ranks) if self.split == "columns" else None

    def read_rows(self, read: Read, rows: slice, columns: slice | None = None) -> Tensor:
        """Returns these rows of the complete Megatron parameter."""
        found = []
        for segment in self.segments:
            low, high = max(rows.start, segment.row), min(rows.stop, segment.row + segment.rows)
            if low < high:
                shift = segment.source - segment.row
                found.append(read(segment.name, rows=slice(low + shift, high + shift), columns=columns))
        return found[0] if len(found) == 1 else torch.cat(found)

    def locate(self, name: str, rows: slice) -> Iterator[slice]:
        """Yields the positions of these rows of a Hugging Face tensor in Megatron's parameter, in their order."""
        for segment in self.segments:
            low, high = max(rows.start, segment.source), min(rows.stop, segment.source + segment.rows)
            if segment.name == name and low < high:
                shift = segment.row - segment.source
                yield slice(low + shift, high + shift)

    def load(self, read: Read, *, rank: int, ranks: int) -> Tensor:
        """Returns the parameter of tensor-parallel rank `rank` of `ranks`."""
        columns = self.shard_columns(rank=rank, ranks=ranks)
        parts = [self.read_rows(read, rows, columns) for rows in self.shard_rows(rank=rank, ranks=ranks)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def unload(self, shards: Sequence[Tensor]) -> dict[str, Tensor]:
        """Returns the Hugging Face tensors, which may share the memory of the shards.

        shards: the parameters of all tensor-parallel ranks, in rank order.
        """
        joined, tensors = self._join(shards), {}
        for name, shape in self.hf_shapes().items():
            parts = [joined[rows] for rows in self.locate(name, slice(0, shape[0]))]
            # Memory that is new costs several times the copy itself, so nothing is copied without need.
            tensors[name] = parts[0] if len(parts) == 1 else torch.cat(parts)
        return tensors

    def _join(self, shards: Sequence[Tensor]) -> Tensor:
        if self.split == "none" or len(shards) == 1:
            return shards[0]
        if self.split == "columns":
            return torch.cat(list(shards), dim=1)
        if self.split == "rows":
            return torch.cat(list(shards))
        firsts, seconds = zip(*(shard.chunk(2) for shard in shards), strict=True)
        return torch.cat((*firsts, *seconds))


def _single(name: str, *shape: int, split: Literal["none", "rows", "columns"] = "none") -> Rule:
    """The parameter equals one Hugging Face tensor."""
    return Rule(shape=shape, segments=(Segment(name, 0, 0, shape[0]),), split=split)


def _gate_up(prefix: str, *, ffn: int, hidden: int) -> Rule:
    """The parameter has all gate rows, then all up rows."""
    segments = (
        Segment(f"{prefix}gate_proj.weight", 0, 0, ffn),
        Segment(f"{prefix}up_proj.weight", 0, ffn, ffn),
    )
    return Rule(shape=(2 * ffn, hidden), segments=segments, split="halves")


def _qkv(prefix: str, shape: ModelShape) -> Rule:
    """The rows are interleaved by key-value group: the group's query heads, then its key, then its value."""
    head, queries = shape.head_dim, shape.num_heads // shape.num_groups * shape.head_dim
    segments, row = [], 0
    for group in range(shape.num_groups):
        for name, rows in (("q_proj", queries), ("k_proj", head), ("v_proj", head)):
            segments.append(Segment(f"{prefix}{name}.weight", group * rows, row, rows))
            row += rows
    return Rule(shape=(row, shape.hidden_size), segments=tuple(segments), split="rows")


_FUSED_NAMES = {  # Transformer Engine's fused names -> the names of the table
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


def layer_rules(shape: ModelShape, layer: int) -> dict[str, Rule]:
    """Returns the rules of a layer (from 0) by the parameter's name inside the layer. Experts are not included."""
    hf, hidden = f"model.layers.{layer}.", shape.hidden_size
    rules = {
        "input_layernorm.weight": _single(hf + "input_layernorm.weight", hidden),
        "self_attention.linear_qkv.weight": _qkv(hf + "self_attn.", shape),
        "self_attention.q_layernorm.weight": _single(hf + "self_attn.q_norm.weight", shape.head_dim),
        "self_attention.k_layernorm.weight": _single(hf + "self_attn.k_norm.weight", shape.head_dim),
        "self_attention.linear_proj.weight": _single(
            hf + "self_attn.o_proj.weight", hidden, shape.num_heads * shape.head_dim, split="columns"
        ),
        "pre_mlp_layernorm.weight": _single(hf + "post_attention_layernorm.weight", hidden),
    }
    if shape.num_experts:
        return rules | {"mlp.router.weight": _single(hf + "mlp.gate.weight", shape.num_experts, hidden)}
    return rules | {f"mlp.{name}": rule for name, rule in _mlp(hf + "mlp.", shape.ffn_size, hidden).items()}


def expert_rules(shape: ModelShape, layer: int, expert: int) -> dict[str, Rule]:
    """Returns the rules of one expert by the parameter's name inside the expert."""
    return _mlp(f"model.layers.{layer}.mlp.experts.{expert}.", shape.expert_ffn_size, shape.hidden_size)


def _mlp(prefix: str, ffn: int, hidden: int) -> dict[str, Rule]:
    return {
        "linear_fc1.weight": _gate_up(prefix, ffn=ffn, hidden=hidden),
        "linear_fc2.weight": _single(f"{prefix}down_proj.weight", hidden, ffn, split="columns"),
    }


def outer_rules(shape: ModelShape) -> dict[str, Rule]:
    """Returns the rules of the parameters before and after the layers."""
    vocabulary = (shape.vocab_size, shape.hidden_size)
    rules = {
        "embedding.word_embeddings.weight": _single("model.embed_tokens.weight", *vocabulary, split="rows"),
        "decoder.final_layernorm.weight": _single("model.norm.weight", shape.hidden_size),
    }
    if not shape.tied:
        rules["output_layer.weight"] = _single("lm_head.weight", *vocabulary, split="rows")
    return rules


_EXPERT = re.compile(
    r"mlp\.experts\.(?:local_experts\.(?P<local>\d+)\.(?P<one>linear_fc[12]\.weight)"
    r"|(?P<many>linear_fc[12])\.weight(?P<grouped>\d+))"
)


def rule_of(name: str, shape: ModelShape, *, first_layer: int = 0, first_expert: int = 0) -> Rule:
    """Returns the rule of one parameter of a pipeline stage.

    first_layer, first_expert: global indices of the layer and expert that the name counts from. If the embedding is
    tied, the last stage holds a copy of it under `output_layer.weight`. Raises KeyError for an unknown parameter.
    """
    matched = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
    if matched is None:
        copied = name == "output_layer.weight" and shape.tied
        inside, rules = "embedding.word_embeddings.weight" if copied else name, outer_rules(shape)
    else:
        layer = first_layer + int(matched[1])
        inside, rules = _FUSED_NAMES.get(matched[2], matched[2]), layer_rules(shape, layer)
        if expert := _EXPERT.fullmatch(inside):
            number = first_expert + int(expert["local"] or expert["grouped"] or 0)
            inside, rules = expert["one"] or f"{expert['many']}.weight", expert_rules(shape, layer, number)
    if inside not in rules:
        raise KeyError(f"no rule maps the Megatron parameter {name} to Qwen3")
    return rules[inside]


def hugging_face_shapes(shape: ModelShape) -> Mapping[str, tuple[int, ...]]:
    """Returns the shape of every tensor of a checkpoint, by name, in the order of the network."""
    return {name: size for entry in checkpoint_entries(shape) for name, size in entry.rule.hf_shapes().items()}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One parameter in a Megatron checkpoint: the parameter of `rule` is stored at `place` of the tensor `key`.

    A checkpoint stacks the layers' parameters along a first axis and the experts' parameters along a second axis.
    """

    key: str
    rule: Rule
    place: tuple[int, ...] = ()  # (layer,), (layer, expert) or ()
    stack: tuple[int, ...] = ()  # sizes of these axes

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the complete tensor `key`."""
        return (*self.stack, *self.rule.shape)


def checkpoint_entries(shape: ModelShape) -> Iterator[Entry]:
    """Yields every parameter of a Megatron checkpoint in the order of the network."""
    outer = outer_rules(shape)
    yield Entry(key="embedding.word_embeddings.weight", rule=outer.pop("embedding.word_embeddings.weight"))
    for layer in range(shape.num_layers):
        yield from _layer_entries(shape, layer)
    for key, rule in outer.items():
        yield Entry(key=key, rule=rule)


# Megatron or Transformer Engine also looks for extra state of these modules of a layer.
_STATEFUL = ("self_attention.linear_qkv", "self_attention.linear_proj", "self_attention.core_attention")
_STATEFUL += ("self_attention.q_layernorm", "self_attention.k_layernorm", "input_layernorm", "pre_mlp_layernorm")


def empty_entries(shape: ModelShape) -> Iterator[str]:
    """Yields the names of the extra objects that Megatron looks for in a checkpoint. Without FP8 they are empty."""
    yield "decoder.final_layernorm._extra_state/shard_0_1"
    layers, experts = shape.num_layers, shape.num_experts
    linear = ("linear_fc1", "linear_fc2")
    for layer in range(layers):
        for module in (*_STATEFUL, *([] if experts else [f"mlp.{name}" for name in linear])):
            yield f"decoder.layers.{module}._extra_state/shard_{layer}_{layers}"
        for expert in range(experts):
            for name in linear:
                key = f"decoder.layers.mlp.experts.experts.{name}._extra_state"
                yield f"{key}/shard_{layer}.{expert}_{layers}.{experts}"


def _layer_entries(shape: ModelShape, layer: int) -> Iterator[Entry]:
    fused = {inside: name for name, inside in _FUSED_NAMES.items()}
    if shape.num_experts:
        del fused["pre_mlp_layernorm.weight"]  # the router uses it too, so no layer fuses it
    stack = (shape.num_layers,)
    for inside, rule in layer_rules(shape, layer).items():
        yield Entry(key=f"decoder.layers.{fused.get(inside, inside)}", rule=rule, place=(layer,), stack=stack)
    for expert in range(shape.num_experts):
        for inside, rule in expert_rules(shape, layer, expert).items():
            key = f"decoder.layers.mlp.experts.experts.{inside}"
            yield Entry(key=key, rule=rule, place=(layer, expert), stack=(*stack, shape.num_experts))
