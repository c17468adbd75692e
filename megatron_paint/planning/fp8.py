"""What FP8 products of Transformer Engine need: memory for copies of weights."""

from megatron_paint.config.megatron import MegatronSettings
from megatron_paint.planning.layout import Layout
from megatron_paint.planning.weights import layer_matrices

COPY_BYTES = 2  # of each weight: a byte along rows and a byte along columns, without the scales


def fp8_copy_bytes(megatron: MegatronSettings, layout: Layout, *, stage: int, engine: bool) -> float:
    """Bytes of the quantised copies of weights that a rank of a stage keeps for the whole run; 0 without FP8.

    Transformer Engine has them of every matrix of its layers, experts included and frozen ones too. Routers, adapters,
    the embedding and the output layer compute in bfloat16, and so do the layers of `first_last_layers_bf16`.
    engine: layers of Transformer Engine.
    """
    if megatron.fp8 is None or not engine:
        return 0.0
    matrices = layer_matrices(
        layout.shape, tp=layout.tensor_parallel, ep=layout.expert_parallel, etp=layout.expert_tensor_parallel
    )
    return float(COPY_BYTES * _fp8_layers(megatron, layout, stage=stage) * matrices)


def _fp8_layers(megatron: MegatronSettings, layout: Layout, *, stage: int) -> int:
    """Layers of a stage that compute in FP8."""
    layers = [layer for chunk in layout.split.layers[stage] for layer in chunk]
    if not megatron.first_last_layers_bf16:
        return len(layers)
    end = layout.shape.num_layers - megatron.num_layers_at_end_in_bf16
    return sum(megatron.num_layers_at_start_in_bf16 <= layer < end for layer in layers)
