"""Seconds of one layer of a rank: products, attention, memory traffic and collectives, forward and backward.

Axes: t tokens of a rank, H hidden size, Q = heads x head size, K = key-value groups x head size, F feed-forward size, k
experts of a token. docs/planner.md has the formulas.
"""

from dataclasses import dataclass
from functools import cached_property

from megatron_paint.models.shape import ModelShape
from megatron_paint.planning.search.candidate import Candidate
from megatron_paint.planning.search.efficiency import (
    ATTENTION,
    ATTENTION_BACKWARD,
    EXPERT_PRODUCTS,
    HALF_ROWS,
    HBM,
    HOST_PER_LAYER,
    NETWORK,
    NVLINK,
    PERMUTATION_PASSES,
    PRODUCTS,
)
from megatron_paint.planning.search.links import Groups
from megatron_paint.planning.search.machines import Gpu
from megatron_paint.planning.search.seconds import Seconds

WIDTH = 2  # bytes of a bfloat16 number


@dataclass(frozen=True, kw_only=True)
class LayerTime:
    """The times of a layer at a layout."""

    shape: ModelShape
    gpu: Gpu
    layout: Candidate
    fp8: bool = False
    lora_rank: int | None = None
    # Whether a token is sent once to each node that has an expert for it, as DeepEP and HybridEP do. Megatron's
    # all-to-all, the one that this package uses, sends it once for each expert.
    once_a_node: bool = False

    @cached_property
    def groups(self) -> Groups:
        """The groups of ranks of the layout."""
        return Groups(gpu=self.gpu, layout=self.layout)

    @cached_property
    def shared_weights(self) -> float:
        """Weights of a layer's matrices on a rank, without experts."""
        shape = self.shape
        queries, keys = shape.num_heads * shape.head_dim, shape.num_groups * shape.head_dim
        dense = 0 if shape.num_experts else 3 * shape.ffn_size
        return shape.hidden_size * (2 * queries + 2 * keys + dense) / self.layout.tp

    @cached_property
    def expert_weights(self) -> float:
        """Weights of a layer's experts on a rank."""
        shape = self.shape
        return self._one_expert * shape.num_experts / (self.layout.ep * self.layout.etp)

    @cached_property
    def adapter_weights(self) -> float:
        """Weights of a layer's adapters on a rank: on the attention, and on a dense feed-forward layer."""
        if self.lora_rank is None:
            return 0.0
        shape, tp = self.shape, self.layout.tp
        queries, keys = shape.num_heads * shape.head_dim, shape.num_groups * shape.head_dim
        dense = 0 if shape.num_experts else 1
        split = 2 * queries + 2 * keys + dense * 3 * shape.ffn_size
        return self.lora_rank * (split / tp + (4 + 3 * dense) * shape.hidden_size)

    @cached_property
    def _one_expert(self) -> float:
        return 3 * self.shape.hidden_size * self.shape.expert_ffn_size

    def forward(self, tokens: float, context: float) -> Seconds:
        """A forward pass. tokens: of a micro-batch, over all context-parallel ranks. context: keys of a token, mean."""
        return self._at_least_the_host(self.device(tokens, context))

    def device(self, tokens: float, context: float) -> Seconds:
        """A forward pass without the host's part."""
        rows = tokens / self.layout.cp
        experts = self.shape.experts_per_token * rows / self.layout.tp  # rows that a rank's experts get, evenly spread
        parts = Seconds(
            products=self._products(rows) + self._adapters(rows) + self._experts(experts),
            attention=self.attention(rows, context),
            memory=self._traffic(rows),
        )
        return parts + self._collectives(rows)

    def backward(self, tokens: float, context: float) -> Seconds:
        """A backward pass: gradients of inputs, and without adapters those of the weights too."""
        rows, full = tokens / self.layout.cp, self.lora_rank is None
        experts = self.shape.experts_per_token * rows / self.layout.tp
        parts = Seconds(
            products=(2 if full else 1) * (self._products(rows) + self._experts(experts)) + 2 * self._adapters(rows),
            attention=ATTENTION_BACKWARD * self.attention(rows, context),
            memory=2 * self._traffic(rows),
        )
        keys_and_values = self._context(rows)  # reduce-scatter of their gradients
        return self._at_least_the_host(parts + self._collectives(rows) + keys_and_values)

    def recomputed(self, tokens: float, context: float) -> Seconds:
        """What the backward pass computes again."""
        if self.layout.recompute == "full":
            return self.forward(tokens, context)
        if self.layout.recompute == "selective":
            return Seconds(attention=self.attention(tokens / self.layout.cp, context))
        return Seconds()

    def attention(self, rows: float, context: float) -> float:
        """Seconds of the two products of attention, forward."""
        width = self.shape.num_heads * self.shape.head_dim / self.layout.tp
        return 4 * rows * context * width / (self.gpu.bf16 * ATTENTION)

    def host_seconds(self, host: str) -> float:
        """Seconds in which the host starts the kernels of a layer."""
        return HOST_PER_LAYER[host][self.shape.num_experts > 0]

    def read(self, size: float) -> float:
        """Seconds to read or write `size` bytes of the GPU's memory."""
        return size / (self.gpu.hbm * HBM)

    def product(self, rows: float, weights: float, *, fp8: bool = False, experts: bool = False) -> float:
        """Seconds of products of `rows` rows with `weights` weights, which are also read once."""
        if rows <= 0 or weights <= 0:
            return 0.0
        kind = "fp8" if fp8 else "bf16"
        peak = (self.gpu.fp8 or self.gpu.bf16) if fp8 else self.gpu.bf16
        rate = peak * (EXPERT_PRODUCTS if experts else PRODUCTS)[kind]
        return max(2 * weights * (rows + HALF_ROWS) / rate, self.read(weights * WIDTH))

    def _products(self, rows: float) -> float:
        return self.product(rows, self.shared_weights, fp8=self.fp8)

    def _experts(self, rows: float) -> float:
        """rows: of all experts of the rank together. Experts of no row are not read; each has its share of the rows."""
        if not self.shape.num_experts or rows <= 0:
            return 0.0
        experts = self.shape.num_experts / self.layout.ep
        rows = rows * self.layout.etp  # those of the ranks that share the experts
        weights = self._one_expert / self.layout.etp
        kind = "fp8" if self.fp8 else "bf16"
        peak = (self.gpu.fp8 or self.gpu.bf16) if self.fp8 else self.gpu.bf16
        used = experts * (1 - (1 - 1 / experts) ** rows) if experts > 1 else 1.0
        flops = 2 * weights * rows / (peak * EXPERT_PRODUCTS[kind])
        return max(flops, self.read(used * weights * WIDTH))

    def _adapters(self, rows: float) -> float:
        return self.product(rows, self.adapter_weights)

    def _traffic(self, rows: float) -> float:
        """Norms, residuals, rotation, activation, adapters' sums, and gathering and scattering of experts' rows."""
        shape, tp = self.shape, self.layout.tp
        queries, keys = shape.num_heads * shape.head_dim / tp, shape.num_groups * shape.head_dim / tp
        numbers = 10 * shape.hidden_size / tp + 4 * (queries + keys)  # sequence parallel wherever tp is above 1
        if shape.num_experts:
            sent = shape.experts_per_token / tp
            numbers += sent * (3 * shape.expert_ffn_size + PERMUTATION_PASSES * shape.hidden_size)
            numbers += 2 * shape.num_experts / tp * 2  # float32 probabilities
        else:
            numbers += 3 * shape.ffn_size / tp
        if self.lora_rank is not None:
            dense = 0 if shape.num_experts else 2 * shape.ffn_size / tp
            numbers += 3 * (queries + 2 * keys + dense) + 3 * 2 * shape.hidden_size / tp
        return self.read(rows * numbers * WIDTH)

    def _collectives(self, rows: float) -> Seconds:
        shape, layout, groups = self.shape, self.layout, self.groups
        states = rows * shape.hidden_size * WIDTH
        blocks = 1 if shape.num_experts else 2  # attention, and a dense feed-forward layer
        found = 2 * blocks * groups.tensor.gather(states)
        if shape.num_experts:
            sent = states / layout.tp * shape.experts_per_token
            found += 2 * self._exchange(sent, states / layout.tp)
            found += 2 * groups.expert_tensor.gather(sent * layout.etp)
        return found + self._context(rows)

    def _exchange(self, sent: float, states: float) -> Seconds:
        """All-to-all of what goes to the experts. states: bytes of the tokens of a rank, each once."""
        group = self.groups.expert
        plain = group.exchange(sent)
        if not self.once_a_node or group.nodes == 1:
            return plain
        nodes = group.nodes
        reached = nodes * (1 - (1 - 1 / nodes) ** self.shape.experts_per_token)
        remote = states * reached * (nodes - 1) / nodes / (self.gpu.network * NETWORK)
        local = sent * (group.on_node - 1) / group.on_node / (self.gpu.nvlink * NVLINK)
        return Seconds(nvlink=local, network=remote)

    def _context(self, rows: float) -> Seconds:
        """All-gather of the keys and values of all context-parallel ranks."""
        keys = 2 * self.shape.num_groups * self.shape.head_dim / self.layout.tp
        return self.groups.context.gather(rows * self.layout.cp * keys * WIDTH)

    def _at_least_the_host(self, device: Seconds) -> Seconds:
        wait = self.host_seconds("trainer") - device.total
        return device + Seconds(host=wait) if wait > 0 else device
