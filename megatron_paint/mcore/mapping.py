"""The one table between Qwen3's tensors in Hugging Face checkpoints and a rank's parameters in Megatron-Core.

A rule knows both directions: which slices of which Hugging Face tensors make one rank's parameter, and how the
parameters of all tensor-parallel ranks make the Hugging Face tensors. Names of both kinds of layer (Megatron's local
ones and Transformer Engine's, which fuse the norms into the linear layers) are understood.

Axes: O output rows, I input columns, G key-value groups of this rank.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_paint.qwen3 import Qwen3Shape

Read = Callable[..., Tensor]  # read(name, rows=slice, columns=slice) -> that part of the tensor


def part(size: int, *, rank: int, ranks: int) -> slice:
    """The contiguous part of `size` entries that belongs to `rank`."""
    return slice(rank * size // ranks, (rank + 1) * size // ranks)


class Rule(ABC):
    """How one Megatron parameter is made of Hugging Face tensors, and back."""

    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and whole shapes of the Hugging Face tensors."""

    @abstractmethod
    def load(self, read: Read, *, rank: int, ranks: int) -> Tensor:
        """The parameter of tensor-parallel rank `rank` of `ranks`."""

    @abstractmethod
    def unload(self, shards: Sequence[Tensor]) -> dict[str, Tensor]:
        """The Hugging Face tensors, from the parameters of all tensor-parallel ranks in order."""


@dataclass(frozen=True)
class Replicated(Rule):
    """The same vector on every rank."""

    name: str
    size: int

    def shapes(self):
        return {self.name: (self.size,)}

    def load(self, read, *, rank, ranks):
        return read(self.name)

    def unload(self, shards):
        return {self.name: shards[0]}


@dataclass(frozen=True)
class Rows(Rule):
    """A matrix split by output rows: the vocabulary."""

    name: str
    rows: int
    columns: int

    def shapes(self):
        return {self.name: (self.rows, self.columns)}

    def load(self, read, *, rank, ranks):
        return read(self.name, rows=part(self.rows, rank=rank, ranks=ranks))

    def unload(self, shards):
        return {self.name: torch.cat(list(shards))}


@dataclass(frozen=True)
class Columns(Rule):
    """A matrix split by input columns: the row-parallel projections."""

    name: str
    rows: int
    columns: int

    def shapes(self):
        return {self.name: (self.rows, self.columns)}

    def load(self, read, *, rank, ranks):
        return read(self.name, columns=part(self.columns, rank=rank, ranks=ranks))

    def unload(self, shards):
        return {self.name: torch.cat(list(shards), dim=1)}


@dataclass(frozen=True)
class GateUp(Rule):
    """Each rank holds its gate rows, then its up rows: not a slice of the concatenation."""

    gate: str
    up: str
    rows: int
    columns: int

    def shapes(self):
        return {self.gate: (self.rows, self.columns), self.up: (self.rows, self.columns)}

    def load(self, read, *, rank, ranks):
        rows = part(self.rows, rank=rank, ranks=ranks)
        return torch.cat((read(self.gate, rows=rows), read(self.up, rows=rows)))

    def unload(self, shards):
        gates, ups = zip(*(shard.chunk(2) for shard in shards), strict=True)
        return {self.gate: torch.cat(gates), self.up: torch.cat(ups)}


@dataclass(frozen=True)
class Qkv(Rule):
    """Interleaved by key-value group: the group's query heads, its key, its value."""

    query: str
    key: str
    value: str
    heads: int
    groups: int
    head_dim: int
    columns: int

    def shapes(self):
        kv = (self.groups * self.head_dim, self.columns)
        return {self.query: (self.heads * self.head_dim, self.columns), self.key: kv, self.value: kv}

    def load(self, read, *, rank, ranks):
        sizes = self._rows_in_group()
        names = (self.query, self.key, self.value)
        blocks = [
            read(name, rows=part(size * self.groups, rank=rank, ranks=ranks)).unflatten(0, (-1, size))
            for name, size in zip(names, sizes, strict=True)
        ]
        return torch.cat(blocks, dim=1).flatten(0, 1)

    def unload(self, shards):
        whole_GOI = torch.cat(list(shards)).unflatten(0, (self.groups, -1))
        blocks = whole_GOI.split(self._rows_in_group(), dim=1)
        names = (self.query, self.key, self.value)
        return {name: block.flatten(0, 1) for name, block in zip(names, blocks, strict=True)}

    def _rows_in_group(self) -> tuple[int, int, int]:
        return (self.heads // self.groups * self.head_dim, self.head_dim, self.head_dim)


_SPELLINGS = {  # Transformer Engine's fused names -> the names of the table
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


def layer_rules(shape: Qwen3Shape, layer: int) -> dict[str, Rule]:
    """Rules of layer `layer` (from 0), by the parameter's name inside the layer."""
    hf, hidden = f"model.layers.{layer}.", shape.hidden_size
    return {
        "input_layernorm.weight": Replicated(hf + "input_layernorm.weight", hidden),
        "self_attention.linear_qkv.weight": Qkv(
            hf + "self_attn.q_proj.weight",
            hf + "self_attn.k_proj.weight",
            hf + "self_attn.v_proj.weight",
            heads=shape.num_heads,
            groups=shape.num_groups,
            head_dim=shape.head_dim,
            columns=hidden,
        ),
        "self_attention.q_layernorm.weight": Replicated(hf + "self_attn.q_norm.weight", shape.head_dim),
        "self_attention.k_layernorm.weight": Replicated(hf + "self_attn.k_norm.weight", shape.head_dim),
        "self_attention.linear_proj.weight": Columns(
            hf + "self_attn.o_proj.weight", hidden, shape.num_heads * shape.head_dim
        ),
        "pre_mlp_layernorm.weight": Replicated(hf + "post_attention_layernorm.weight", hidden),
        "mlp.linear_fc1.weight": GateUp(hf + "mlp.gate_proj.weight", hf + "mlp.up_proj.weight", shape.ffn_size, hidden),
        "mlp.linear_fc2.weight": Columns(hf + "mlp.down_proj.weight", hidden, shape.ffn_size),
    }


def outer_rules(shape: Qwen3Shape) -> dict[str, Rule]:
    """Rules of what stands before and after the layers."""
    rules: dict[str, Rule] = {
        "embedding.word_embeddings.weight": Rows("model.embed_tokens.weight", shape.vocab_size, shape.hidden_size),
        "decoder.final_layernorm.weight": Replicated("model.norm.weight", shape.hidden_size),
    }
    if not shape.tied:
        rules["output_layer.weight"] = Rows("lm_head.weight", shape.vocab_size, shape.hidden_size)
    return rules


def rule_of(name: str, shape: Qwen3Shape, *, first_layer: int) -> Rule:
    """The rule of one parameter of a pipeline stage whose layers begin at global layer `first_layer`.

    A tied last stage holds a copy of the embedding under `output_layer.weight`.
    """
    if matched := re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name):
        inside = _SPELLINGS.get(matched[2], matched[2])
        rules = layer_rules(shape, first_layer + int(matched[1]))
    elif name == "output_layer.weight" and shape.tied:
        inside, rules = "embedding.word_embeddings.weight", outer_rules(shape)
    else:
        inside, rules = name, outer_rules(shape)
    if inside not in rules:
        raise KeyError(f"no rule maps the Megatron parameter {name} to Qwen3")
    return rules[inside]


def hugging_face_shapes(shape: Qwen3Shape) -> Mapping[str, tuple[int, ...]]:
    """Every tensor that a checkpoint of this shape holds, with its shape."""
    shapes: dict[str, tuple[int, ...]] = {}
    for rule in outer_rules(shape).values():
        shapes |= rule.shapes()
    for layer in range(shape.num_layers):
        for rule in layer_rules(shape, layer).values():
            shapes |= rule.shapes()
    return shapes
