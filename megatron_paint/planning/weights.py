"""How many weights each rank has, counted from the sizes of the model."""

from dataclasses import dataclass

from megatron_paint.models.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class RankWeights:
    """Numbers of weights on one rank of a pipeline stage."""

    base: int  # all of them without adapters
    experts: int  # those of `base` that belong to experts, which have copies on other ranks than the rest
    adapters: int
    trained: int
    trained_experts: int  # those of `trained` that belong to experts
    embedding: int  # rows of the embedding; 0 except on the first stage
    output: int  # rows of the output layer; 0 except on the last stage. A tied one counts, although one stage shares it
    # Of the largest matrix of a layer, or of the matrices of its experts that are one product; 0 without layers.
    largest: int


def rank_weights(
    shape: ModelShape,
    *,
    tp: int,
    pp: int,
    stage: int,
    layers: int,
    lora_rank: int | None,
    ep: int = 1,
    etp: int = 1,
    adapts_experts: bool = False,
    groups_experts: bool = False,
) -> RankWeights:
    """The weights of a rank of `stage`, which has `layers` layers.

    Norms and routers are on every tensor-parallel rank; everything else is split over them, except experts: a rank has
    one of `ep` parts of each layer's experts, and of each of these one of `etp` parts.
    The first stage has the embedding, the last one the final norm and the output layer. If the two are tied, they are
    one matrix on a single stage and two copies on several stages.
    groups_experts: one product computes all experts of a layer, as in Transformer Engine.
    """
    table = shape.vocab_rows(tp) * shape.hidden_size
    first, last = stage == 0, stage == pp - 1
    ends = table * (first + last) - (table if shape.tied and first and last else 0) + (shape.hidden_size if last else 0)
    expert_adapters = layers * expert_adapter_weights(shape, lora_rank, ep=ep) if lora_rank and adapts_experts else 0
    adapters = 0 if lora_rank is None else layers * rank_adapters(shape, lora_rank, tp=tp) + expert_adapters
    experts = layers * _expert_matrices(shape, ep=ep, etp=etp)
    base = layers * _layer_weights(shape, tp=tp) + experts + ends
    return RankWeights(
        base=base,
        experts=experts,
        adapters=adapters,
        trained=base if lora_rank is None else adapters,
        trained_experts=experts if lora_rank is None else expert_adapters,
        embedding=table if first else 0,
        output=table if last else 0,
        largest=_largest(shape, tp=tp, etp=etp, together=shape.num_experts // ep if groups_experts else 1)
        if layers
        else 0,
    )


def adapter_parameters(shape: ModelShape, lora_rank: int, *, experts: bool = False) -> int:
    """The number of weights of LoRA adapters of the complete model. experts: those of a mixture have adapters too."""
    of_experts = expert_adapter_weights(shape, lora_rank, ep=1) if experts else 0
    return shape.num_layers * (rank_adapters(shape, lora_rank, tp=1) + of_experts)


def rank_adapters(shape: ModelShape, lora_rank: int, *, tp: int) -> int:
    """Adapters of one layer on a rank, without experts: on all seven projections, or on the four of attention.

    q, k, v, gate and up split their outputs; o and down split their inputs.
    """
    queries, keys, hidden = shape.num_heads * shape.head_dim, shape.num_groups * shape.head_dim, shape.hidden_size
    ffn = 0 if shape.num_experts else shape.ffn_size
    outputs = queries + 2 * keys + 2 * ffn  # of the first five, whose A is complete on every rank
    inputs = queries + ffn  # of the other two, whose B is complete on every rank
    complete = 3 + 1 if shape.num_experts else 5 + 2
    return lora_rank * ((outputs + inputs) // tp + complete * hidden)


def expert_adapter_weights(shape: ModelShape, lora_rank: int, *, ep: int) -> int:
    """Adapters of the experts of one layer on a rank: a pair for gate and up together, and one for down."""
    return shape.num_experts // ep * lora_rank * (2 * shape.hidden_size + 3 * shape.expert_ffn_size)


def layer_matrices(shape: ModelShape, *, tp: int, ep: int = 1, etp: int = 1) -> int:
    """The weights of the matrices of one layer on a rank: attention, and feed-forward layer or experts. No router."""
    return _split_matrices(shape) // tp + _expert_matrices(shape, ep=ep, etp=etp)


def _split_matrices(shape: ModelShape) -> int:
    """Those of all tensor-parallel ranks, without experts."""
    queries, keys = shape.num_heads * shape.head_dim, shape.num_groups * shape.head_dim
    return shape.hidden_size * (2 * queries + 2 * keys + (0 if shape.num_experts else 3 * shape.ffn_size))


def _expert_matrices(shape: ModelShape, *, ep: int, etp: int) -> int:
    """The weights of the experts of one layer on a rank."""
    return 3 * shape.num_experts * shape.hidden_size * shape.expert_ffn_size // (ep * etp)


def _layer_weights(shape: ModelShape, *, tp: int) -> int:
    """The weights of one layer on a rank, without experts."""
    queries, keys = shape.num_heads * shape.head_dim, shape.num_groups * shape.head_dim
    split = _split_matrices(shape) + (queries + 2 * keys if shape.qkv_bias else 0)
    router = shape.num_experts * shape.hidden_size
    return split // tp + router + 2 * shape.hidden_size + (2 * shape.head_dim if shape.qk_norm else 0)


def _largest(shape: ModelShape, *, tp: int, etp: int, together: int) -> int:
    """The weights of the largest matrix of a layer on a rank. together: experts whose matrices are one product."""
    if not shape.num_experts:
        return 2 * shape.ffn_size * shape.hidden_size // tp
    attention = (shape.num_heads + 2 * shape.num_groups) * shape.head_dim // tp
    experts = together * 2 * shape.expert_ffn_size // etp
    return max(attention, experts) * shape.hidden_size
