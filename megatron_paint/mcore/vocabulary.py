"""The vocabulary over tensor-parallel ranks: equal shares of rows, padded at the end where it does not divide.

Padding rows are zeros. No token has their ids, the losses and the sampler leave their columns out, so their gradients
are zero and no result depends on them. Hugging Face folders never have them. Megatron checkpoints do, as with other
Megatron programs; another layout that loads one adds or drops rows at the end.

Axes: V rows of the vocabulary on this rank, H hidden size.
"""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_paint.losses import ShardedVocab, VocabAxis, WholeVocab
from megatron_paint.mcore.ranks import Ranks
from megatron_paint.models.qwen3.mapping import Read, Rule
from megatron_paint.models.shape import ModelShape


def vocab_axis(shape: ModelShape, ranks: Ranks, config: TransformerConfig) -> VocabAxis:
    """The vocabulary axis of the losses."""
    if ranks.tp_size == 1:
        return WholeVocab()
    # Under sequence parallelism the backward of the response rows sums the hidden states' gradient.
    return ShardedVocab.from_columns(
        ranks.tp_group,
        shape.vocab_rows(ranks.tp_size),
        valid_size=shape.vocab_size,
        reduce_hidden_grad=not config.sequence_parallel,
    )


def load_vocab_rows(rule: Rule, read: Read, ranks: Ranks) -> Tensor:
    """This rank's rows [V, H] of the embedding or the output layer, padding included."""
    size = rule.shape[0]
    rows = -(-size // ranks.tp_size)
    start, stop = (min((ranks.tp_rank + more) * rows, size) for more in (0, 1))
    if start == stop:  # more ranks than the vocabulary fills
        return torch.zeros(rows, *rule.shape[1:])
    values = rule.read_rows(read, slice(start, stop))
    padding = values.new_zeros(rows - len(values), *rule.shape[1:])
    return torch.cat([values, padding]) if len(padding) else values
