"""How many weights each rank has, counted from the sizes of the model."""

from dataclasses import dataclass

from megatron_paint.models.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class RankWeights:
    """Numbers of weights on one rank of a pipeline stage."""

    base: int  # all of them without adapters
    adapters: int
    trained: int
    embedding: int  # rows of the embedding; 0 except on the first stage
    output: int  # rows of the output layer; 0 except on the last stage. A tied one counts, although one stage shares it
    largest: int  # of the largest matrix of a layer; 0 on a stage without layers


def rank_weights(shape: ModelShape, *, tp: int, pp: int, stage: int, layers: int, lora_rank: int | None) -> RankWeights:
    """The weights of a rank of `stage`, which has `layers` layers.

    Norms are on every tensor-parallel rank; everything else is split over them. The first stage has the embedding, the
    last one the final norm and the output layer. If the two are tied, they are one matrix on a single stage and two
    copies on several stages.
    """
    table = shape.vocab_rows(tp) * shape.hidden_size
    first, last = stage == 0, stage == pp - 1
    ends = table * (first + last) - (table if shape.tied and first and last else 0) + (shape.hidden_size if last else 0)
    adapters = 0 if lora_rank is None else layers * rank_adapters(shape, lora_rank, tp=tp)
    base = layers * _layer_weights(shape, tp=tp) + ends
    return RankWeights(
        base=base,
        adapters=adapters,
        trained=base if lora_rank is None else adapters,
        embedding=table if first else 0,
        output=table if last else 0,
        largest=2 * shape.ffn_size * shape.hidden_size // tp if layers else 0,
    )


def adapter_parameters(shape: ModelShape, lora_rank: int) -> int:
    """The number of weights of LoRA adapters on all seven projections of every layer of the complete model."""
    return shape.num_layers * rank_adapters(shape, lora_rank, tp=1)


def rank_adapters(shape: ModelShape, lora_rank: int, *, tp: int) -> int:
    """Adapters of one layer on a rank. q, k, v, gate and up split their outputs; o and down split their inputs."""
    queries, keys, hidden = shape.num_heads * shape.head_dim, shape.num_groups * shape.head_dim, shape.hidden_size
    outputs = queries + 2 * keys + 2 * shape.ffn_size  # of the first five, whose A is complete on every rank
    inputs = queries + shape.ffn_size  # of the other two, whose B is complete on every rank
    return lora_rank * ((outputs + inputs) // tp + (5 + 2) * hidden)


def _layer_weights(shape: ModelShape, *, tp: int) -> int:
    queries, keys = shape.num_heads * shape.head_dim, shape.num_groups * shape.head_dim
    split = shape.hidden_size * (2 * queries + 2 * keys + 3 * shape.ffn_size)
    split += queries + 2 * keys if shape.qkv_bias else 0
    return split // tp + 2 * shape.hidden_size + (2 * shape.head_dim if shape.qk_norm else 0)
