"""What autograd saves for the backward pass, in bytes, and what a layer holds besides while it computes.

The numbers of tensors were counted with torch's hooks for saved tensors (plain layers, CPU; tests/planning), or follow
from what the layers of Transformer Engine 2 compute (not measured). FP8 is counted like its unquantised type.

Per token and layer, with H hidden size, Q query and output heads x head size, K key-value groups x head size, F
feed-forward size, split over the tensor-parallel ranks except H:

    norms            input and output of each: 4 H; plain torch with trained weights also the normalised values: 6 H
    attention        fused q, k, v (Q + 2 K); norm, rotation and kernel save q and k once each, v and the output once
    feed-forward     gate and up 2 F, their product F; plain torch also silu(gate) and a copy of up: 5 F
    experts          of each of a token's experts its input H, gate and up, the product before and after it is scaled
                     by the router's probability: H + 4 F; plain torch H + 6 F. Frozen experts save F and H less.
                     Routing: places and probabilities of the token's experts, and values and masks of all experts.
                     The experts' load is taken to be even
"""

from dataclasses import dataclass

from megatron_paint.models.shape import ModelShape

FLOAT32 = 4
ROUTED_BYTES = 40  # of each chosen expert of a token: its place several times, its probability. Counted as above
CANDIDATE_BYTES = 6  # of each expert for each token: masks and float32 values of the router


@dataclass(frozen=True, kw_only=True)
class LayerKind:
    """How the layers of a rank are computed, as far as it decides what they save."""

    shape: ModelShape
    width: int  # bytes of an activation
    tp: int
    sequence_parallel: bool
    engine: bool  # layers of Transformer Engine
    context: int = 1  # ranks that share the tokens of a row
    lora_rank: int | None
    selective: bool = False  # the attention kernel is computed again in the backward pass
    etp: int = 1  # expert tensor parallel
    adapts_experts: bool = False  # LoRA on experts too

    @property
    def hidden(self) -> float:
        """Hidden units of a token on this rank."""
        return self.shape.hidden_size / (self.tp if self.sequence_parallel else 1)

    @property
    def queries(self) -> float:
        return self.shape.num_heads * self.shape.head_dim / self.tp

    @property
    def keys(self) -> float:
        return self.shape.num_groups * self.shape.head_dim / self.tp

    @property
    def ffn(self) -> float:
        """Feed-forward units of a token on this rank, of all its experts together in a mixture."""
        if self.shape.num_experts:
            return self.expert_tokens * self.shape.expert_ffn_size / self.etp
        return self.shape.ffn_size / self.tp

    @property
    def expert_tokens(self) -> float:
        """Tokens that this rank's experts compute for each token of a micro-batch, if all experts have as many."""
        return self.shape.experts_per_token * self.etp / self.tp

    def input_bytes(self) -> float:
        """Bytes of a layer's input for each token: all that full recomputation keeps of it."""
        return self.hidden * self.width

    def saved_bytes(self) -> float:
        """Bytes that one layer saves for each token without recomputation."""
        heads, groups = self.shape.num_heads / self.tp, self.shape.num_groups / self.tp
        plain_and_full = not self.engine and self.lora_rank is None
        norms = (6 if plain_and_full else 4) * self.hidden
        if self.engine:
            attention = 4 * self.queries + 5 * self.keys
        else:  # the kernel's inputs and output are copied into rectangles of rows
            attention = (6 if plain_and_full else 5) * self.queries + (5 if plain_and_full else 4) * self.keys
            if groups == 1:  # the queries of one group are a view of the fused tensor, not a copy
                attention -= self.queries
        if self.context > 1 and not self.engine:  # two rectangles of keys and values, of all ranks' tokens
            attention += 2 * self.keys * (self.context + 0.5 - 1)
        if self.selective and not self.engine:
            attention -= self.queries + self.keys
        feed_forward = (3 if self.engine else 5) * self.ffn
        if self.shape.num_experts and (self.lora_rank is None or self.adapts_experts):
            # The inputs of both matrices, which frozen experts without adapters do not save.
            feed_forward += self.ffn + self.expert_tokens * self.shape.hidden_size
        units = norms + attention + feed_forward + self._adapter_units() + 4 * self.shape.head_dim  # cosines and sines
        row = self.shape.hidden_size / self.hidden
        scales = 2 / row + heads + groups + (0 if self.selective else heads)  # of the norms; of attention's softmax
        return units * self.width + scales * FLOAT32 + self._routing_bytes()

    def _routing_bytes(self) -> float:
        """What the router and the dispatcher of tokens save for each token."""
        if not self.shape.num_experts:
            return 0.0
        local = 1 / self.tp  # tokens are routed where they are
        return local * (self.shape.experts_per_token * ROUTED_BYTES + self.shape.num_experts * CANDIDATE_BYTES)

    def working_bytes(self) -> float:
        """Bytes for each token that exist besides while a layer's gradient is computed: about its widest part."""
        return self._widest(4 * self.ffn + self._dispatched()) + self._gathered()

    def forward_bytes(self) -> float:
        """The same of a forward pass without gradients.

        Beside the output of a layer with adapters exists theirs, joined from two parts and scaled.
        """
        return self._widest((4 if self.lora_rank is None else 6) * self.ffn + self._dispatched()) + self._gathered()

    def _gathered(self) -> float:
        """Keys and values of all context-parallel ranks, of one layer; Transformer Engine passes them on in turn."""
        return 2 * self.keys * self.width * (2 if self.engine else self.context) if self.context > 1 else 0.0

    def _dispatched(self) -> float:
        """Hidden units of the experts' inputs and outputs, before and after they are sorted."""
        return 4 * self.expert_tokens * self.shape.hidden_size if self.shape.num_experts else 0.0

    def _widest(self, feed_forward: float) -> float:
        return (3 * self.hidden + max(3 * self.queries + 4 * self.keys, feed_forward)) * self.width

    def saved_weights(self) -> float:
        """Bytes of the joined A of adapters that a layer saves, however many tokens there are."""
        joined = 3 if self.shape.num_experts else 5
        return 0.0 if self.lora_rank is None else joined * self.lora_rank * self.shape.hidden_size * self.width

    def _adapter_units(self) -> float:
        """Inputs of the B of adapters: of five for every token, of two for this rank's slice of the tokens."""
        if self.lora_rank is None:
            return 0.0
        share = self.hidden / self.shape.hidden_size
        if not self.shape.num_experts:
            return self.lora_rank * (5 + 2 * share)
        of_experts = 2 * self.expert_tokens if self.adapts_experts else 0
        return self.lora_rank * (3 + share + of_experts)


@dataclass(frozen=True, kw_only=True)
class Recompute:
    """megatron.recompute_*: what is computed again in the backward pass."""

    granularity: str | None
    method: str | None
    num_layers: int | None


@dataclass(frozen=True, kw_only=True)
class StageActivations:
    """Bytes of one micro-batch on a stage."""

    inputs: float  # of recomputed layers, from the forward to the backward pass
    kept: float  # of other layers, from the forward to the backward pass
    recomputed: float  # besides, while the layers of one unit are computed again
    working: float  # besides, while a layer is computed


def stage_activations(kind: LayerKind, recompute: Recompute, *, layers: int, tokens: int) -> StageActivations:
    """The activations of `layers` layers and a micro-batch of `tokens` tokens."""
    if not layers:
        return StageActivations(inputs=0.0, kept=0.0, recomputed=0.0, working=0.0)
    layer = tokens * kind.saved_bytes() + kind.saved_weights()
    working = tokens * kind.working_bytes()
    if recompute.granularity != "full":
        return StageActivations(inputs=0.0, kept=layers * layer, recomputed=0.0, working=working)
    inputs = tokens * kind.input_bytes()  # the recomputed layers save the same tensor
    unit = recompute.num_layers or 1
    angles = tokens * kind.shape.head_dim * FLOAT32  # of the rotation, saved once with the inputs
    if recompute.method == "block":  # the first `unit` layers are recomputed one by one
        redone = min(unit, layers)
        kept = (layers - redone) * layer
        return StageActivations(inputs=redone * inputs + angles, kept=kept, recomputed=layer - inputs, working=working)
    units, recomputed = -(-layers // unit), min(unit, layers) * layer - inputs
    return StageActivations(inputs=units * inputs + angles, kept=0.0, recomputed=recomputed, working=working)


def final_norm_bytes(kind: LayerKind, *, tokens: int) -> float:
    """What the final norm saves on the last stage: its input, and with plain trained layers the normalised values."""
    copies = 2 if not kind.engine and kind.lora_rank is None else 1
    return tokens * kind.hidden * kind.width * copies
