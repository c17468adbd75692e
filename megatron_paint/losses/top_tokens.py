"""The likeliest tokens at each row, over a complete or a sharded vocabulary.

Axes: T tokens, V this rank's vocabulary columns, H hidden, R ranks, K likeliest tokens.
"""

from dataclasses import dataclass

import torch

from megatron_paint.losses import checks
from megatron_paint.losses.cpu_math import settle_cpu_math
from megatron_paint.losses.output_layer.chunks import chunk_size, plan_chunks
from megatron_paint.losses.output_layer.products import Projection
from megatron_paint.losses.vocab import VocabAxis


@dataclass(frozen=True, kw_only=True)
class TopTokens:
    """ids_TK [T, K] int64, probability_TK [T, K] in [0, 1]: the likeliest first, over the complete vocabulary."""

    ids_TK: torch.Tensor
    probability_TK: torch.Tensor


@torch.no_grad()
def top_tokens(
    hidden_TH: torch.Tensor,
    output_weight_VH: torch.Tensor,
    *,
    vocab: VocabAxis,
    count: int,
    chunk_bytes: float = 1e9,
) -> TopTokens:
    """The `count` largest entries of softmax(hidden weight^T) at each row, at temperature 1.

    hidden_TH [T, H]: final hidden states; output_weight_VH [V, H]: this rank's rows of the output layer. K is `count`,
    or the vocabulary's size if that is smaller. Every rank gets the same result. Cost: one product with the output
    layer, and one collective a chunk of 1 + 2 K numbers a token from each rank. Raises ValueError for arguments that
    do not fit together.
    """
    settle_cpu_math()
    tokens, columns = hidden_TH.shape[0], output_weight_VH.shape[0]
    checks.check_matrix("output_weight_VH", output_weight_VH, "columns x hidden", like=(None, None))
    checks.check_matrix("hidden_TH", hidden_TH, "tokens x hidden", like=(None, output_weight_VH.shape[1]))
    if count < 1:
        raise ValueError(f"count: got {count}; it counts tokens, 1 or more")
    dtype, device = checks.compute_dtype(hidden_TH, output_weight_VH), hidden_TH.device
    count = min(count, vocab.full_size(columns))
    valid = vocab.valid_columns(columns)
    size = chunk_size(None, chunk_bytes, columns=vocab.widest(columns), buffers=2, dtype=dtype, device=device)
    project = Projection(output_weight_VH.detach()[:valid], dtype, most_rows=min(size.tokens, tokens))
    ids_TK = torch.empty((tokens, count), dtype=torch.int64, device=device)
    probability_TK = torch.empty((tokens, count), dtype=dtype, device=device)
    for chunk in plan_chunks((tokens,), size.together, whole_rollouts=False):
        logits_TV = project(hidden_TH.detach()[chunk.rows])
        packed_RTP = vocab.gather(_packed(logits_TV, count, start=vocab.start))
        log_sum_T = packed_RTP[..., 0].logsumexp(dim=0)
        values_TC, candidates_TC = (_side_by_side(part) for part in packed_RTP[..., 1:].split(count, dim=-1))
        best_TK, places_TK = values_TC.topk(count, dim=-1)
        ids_TK[chunk.rows] = candidates_TC.gather(-1, places_TK).to(torch.int64)
        probability_TK[chunk.rows] = (best_TK - log_sum_T[:, None]).exp()
    return TopTokens(ids_TK=ids_TK, probability_TK=probability_TK)


def _packed(logits_TV: torch.Tensor, count: int, *, start: int) -> torch.Tensor:
    """This rank's log of the sum of exponentials, its `count` largest logits, and their ids [T, 1 + 2 count].

    A rank with fewer columns fills up with -inf. Ids are exact in float32: they are below 2^24.
    """
    tokens, columns = logits_TV.shape
    packed = logits_TV.new_full((tokens, 1 + 2 * count), float("-inf"))
    packed[:, 1 + count :] = 0.0
    if columns:
        own = min(count, columns)
        values, places = logits_TV.topk(own, dim=-1)
        packed[:, 0] = logits_TV.logsumexp(dim=-1)
        packed[:, 1 : 1 + own] = values
        packed[:, 1 + count : 1 + count + own] = (places + start).to(logits_TV.dtype)
    return packed


def _side_by_side(part_RTK: torch.Tensor) -> torch.Tensor:
    """The candidates of all ranks of each token [T, R K]."""
    return part_RTK.transpose(0, 1).flatten(1)
