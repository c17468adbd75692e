"""Attention over packed rows, with a key-value cache for sampling: one code path for training and generation.

The rows of a call are concatenated without padding: hidden states are [T, 1, H]. Everything in the network except
attention works on single tokens, so only this file knows rows. `TokenRows` is passed down the layers as Megatron's
`packed_seq_params`. It is an argument, so that activation recomputation gets the right one.

Axes: T tokens of the call, R rows, S longest row, K keys, N heads of this rank, G key-value groups of this rank, D head
size. Megatron's static inference context has one offset for a complete batch and differs between its versions; rows of
different lengths and pipeline stages need one offset a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_paint.mcore.context import ContextSlice


class KeyValueCache:
    """Keys and values of all layers of a stage, [R, K, G, D] each, for `rows` rows of at most `length` tokens."""

    def __init__(self, *, rows: int, length: int) -> None:
        self.rows = rows
        self.length = length
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def write(self, layer: int, key_TGD: Tensor, value_TGD: Tensor, rows: "TokenRows") -> tuple[Tensor, Tensor]:
        """Stores the call's keys and values at their rows and positions; returns everything that the layer holds."""
        if layer not in self.layers:
            # Zeros: a masked key still contributes 0 times its value, which must be finite.
            shape = (self.rows, self.length, *key_TGD.shape[1:])
            self.layers[layer] = (key_TGD.new_zeros(shape), value_TGD.new_zeros(shape))
        keys_RKGD, values_RKGD = self.layers[layer]
        places = rows.row_T[: rows.tokens], rows.position_T[: rows.tokens]
        keys_RKGD[places] = key_TGD
        values_RKGD[places] = value_TGD
        return keys_RKGD, values_RKGD

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Keeps only these rows, in this order."""
        for layer, (keys, values) in self.layers.items():
            index = torch.tensor(rows, device=keys.device)
            self.layers[layer] = (keys[index], values[index])


@dataclass(frozen=True, kw_only=True)
class TokenRows:
    """For each of a call's T tokens: its row, its index among the call's tokens of that row, its position.

    A call may end in padding, which the layout or FP8 needs. Padding is a separate last row that no cache holds. With
    context parallelism `position_T` is of this rank's tokens alone, everything else of the complete call.
    """

    lengths: tuple[int, ...]  # the call's tokens in each row, without padding
    padding: int
    row_T: Tensor
    slot_T: Tensor
    position_T: Tensor  # slot_T plus the number of tokens of the row that the cache already holds
    begins: Tensor  # int32: where each row begins in T, and T at the end, as packed attention kernels expect it
    end: int  # one past the largest position of a row
    cache: KeyValueCache | None = None
    visible_RSK: Tensor | None = None  # which cached keys a new token sees; None if the cache was empty
    context: ContextSlice | None = None  # None: this rank has all tokens of the call
    qkv_format: str = "rows"  # not "thd": Megatron's layers then leave the tensors alone
    tokens_per_sample: None = None  # read by Megatron's MoE layers

    @property
    def tokens(self) -> int:
        """The call's tokens without padding."""
        return sum(self.lengths)

    @property
    def packed_lengths(self) -> tuple[int, ...]:
        """The rows' tokens, padding as a row."""
        return (*self.lengths, self.padding) if self.padding else self.lengths


def token_rows(
    lengths: Sequence[int], *, device: torch.device, padding: int = 0, cache: KeyValueCache | None = None
) -> TokenRows:
    """Rows that begin with the call: the numbers of their tokens. A cache must be empty."""
    packed_R = torch.tensor((*lengths, padding) if padding else lengths, dtype=torch.int64)
    row_T = torch.repeat_interleave(torch.arange(len(packed_R)), packed_R)
    begin_R = packed_R.cumsum(0) - packed_R
    slot_T = (torch.arange(len(row_T)) - begin_R[row_T]).to(device)
    return TokenRows(
        lengths=tuple(lengths),
        padding=padding,
        row_T=row_T.to(device),
        slot_T=slot_T,
        position_T=slot_T,
        begins=torch.cat((begin_R, torch.tensor([len(row_T)]))).to(device, torch.int32),
        end=max(lengths, default=0),
        cache=cache,
    )


def next_token_rows(position_R: Tensor, *, end: int, cache: KeyValueCache, padding: int = 0) -> TokenRows:
    """One token for each row of the cache, at the given positions. end: one past the largest of them.

    The positions stay on their device, and nothing waits for it.
    """
    count, device = len(position_R), position_R.device
    row_T = torch.arange(count + padding, device=device)
    begins = torch.arange(count + 1, device=device)
    slot_T = (row_T - count).clamp_min_(0)
    return TokenRows(
        lengths=(1,) * count,
        padding=padding,
        row_T=row_T.clamp_max(count),
        slot_T=slot_T,
        position_T=torch.cat((position_R, slot_T[count:])),
        begins=(F.pad(begins, (0, 1), value=count + padding) if padding else begins).int(),
        end=end,
        cache=cache,
        visible_RSK=torch.arange(end, device=device) <= position_R[:, None, None],
    )


def attend_rows(
    query_TND: Tensor, key_TGD: Tensor, value_TGD: Tensor, *, rows: TokenRows, layer: int, scale: float | None
) -> Tensor:
    """Causal grouped-query attention of each row's new tokens over the complete row: [T, N, D].

    scale: the factor of the scores before the softmax; None: 1 / sqrt(D). Rows are copied into a rectangle for torch's
    kernels; its padding is never read back.
    """
    if rows.context is not None:
        return _attend_slice(query_TND, key_TGD, value_TGD, context=rows.context, scale=scale)
    lengths, count = (rows.packed_lengths, len(query_TND)) if rows.cache is None else (rows.lengths, rows.tokens)
    parts = (query_TND[:count], key_TGD[:count], value_TGD[:count])
    query_RSND, keys_RKGD, values_RKGD = (_spread(part, lengths, rows) for part in parts)
    if rows.cache is not None:
        held = rows.cache.write(layer, *parts[1:], rows)
        if rows.visible_RSK is not None:
            keys_RKGD, values_RKGD = (kept[: len(lengths), : rows.end] for kept in held)
    mask_R1QK = None
    if rows.visible_RSK is not None:
        heads_per_group = query_RSND.size(2) // keys_RKGD.size(2)
        mask_R1QK = rows.visible_RSK.repeat_interleave(heads_per_group, dim=1)[:, None]
    out_RSND = _attend_grouped(query_RSND, keys_RKGD, values_RKGD, mask_R1QK, scale)
    one_each = out_RSND.size(1) == 1
    out_TND = out_RSND[:, 0] if one_each else out_RSND[rows.row_T[:count], rows.slot_T[:count]]
    return out_TND if count == len(query_TND) else torch.cat((out_TND, torch.zeros_like(query_TND[count:])))


def _attend_slice(
    query_LND: Tensor, key_LGD: Tensor, value_LGD: Tensor, *, context: ContextSlice, scale: float | None
) -> Tensor:
    """The same for this rank's slice of each row: [L, N, D]."""
    gathered = context.gather(key_LGD, value_LGD)
    heads_per_group = query_LND.size(1) // key_LGD.size(1)
    out_LND = torch.empty_like(query_LND)
    for piece in context.pieces:
        rows = len(piece.visible_RSK)
        queries = query_LND.new_zeros((rows, piece.queries, *query_LND.shape[1:]))
        keys = gathered.new_zeros((rows, piece.keys, *gathered.shape[1:]))
        queries = queries.index_put((piece.row_Q, piece.slot_Q), query_LND[piece.local_Q])
        keys = keys.index_put((piece.row_P, piece.slot_P), gathered[piece.gathered_P])
        mask_R1QK = piece.mask(heads_per_group, query_LND.dtype)
        out_RSND = _attend_grouped(queries, *keys.chunk(2, dim=-1), mask_R1QK, scale)
        out_LND = out_LND.index_put((piece.local_Q,), out_RSND[piece.row_Q, piece.slot_Q])
    return out_LND


def _attend_grouped(
    query_RSND: Tensor, keys_RKGD: Tensor, values_RKGD: Tensor, mask_R1QK: Tensor | None, scale: float | None
) -> Tensor:
    """Attention [R, S, N, D], causal without a mask. Q: S queries x the heads of a group.

    With a mask the query heads of a group become more queries of one head. Torch's fast kernels accept a mask or
    grouped heads; with both, torch falls back to a kernel that stores all scores and copies the keys.
    """
    if mask_R1QK is None:
        out_RNSD = F.scaled_dot_product_attention(
            *(part.transpose(1, 2) for part in (query_RSND, keys_RKGD, values_RKGD)),
            is_causal=True,
            scale=scale,
            enable_gqa=True,
        )
        return out_RNSD.transpose(1, 2)
    groups, length = keys_RKGD.size(2), query_RSND.size(1)
    grouped_RGQD = query_RSND.unflatten(2, (groups, -1)).transpose(1, 2).flatten(2, 3)
    out_RGQD = F.scaled_dot_product_attention(
        grouped_RGQD, keys_RKGD.transpose(1, 2), values_RKGD.transpose(1, 2), attn_mask=mask_R1QK, scale=scale
    )
    return out_RGQD.unflatten(2, (length, -1)).transpose(1, 2).flatten(2, 3)


def _spread(values_T: Tensor, lengths: Sequence[int], rows: TokenRows) -> Tensor:
    """[T, ...] -> [R, S, ...]; the rest of a short row is 0."""
    if max(lengths) == 1:
        return values_T[:, None]
    rectangle = values_T.new_zeros((len(lengths), max(lengths), *values_T.shape[1:]))
    return rectangle.index_put((rows.row_T[: len(values_T)], rows.slot_T[: len(values_T)]), values_T)


class LocalAttention(MegatronModule):
    """Core attention in plain torch: for machines without Transformer Engine, and the reference for it."""

    def __init__(self, config, layer_number, attn_mask_type, attention_type, **unused):
        super().__init__(config=config)
        self.layer_number = layer_number

    def forward(self, query, key, value, attention_mask=None, *, packed_seq_params: TokenRows, **unused) -> Tensor:
        """query [T, 1, N, D], key and value [T, 1, G, D] -> [T, 1, N * D]."""
        parts, rows = (query[:, 0], key[:, 0], value[:, 0]), packed_seq_params
        out_TND = attend_rows(*parts, rows=rows, layer=self.layer_number, scale=self.config.softmax_scale)
        return out_TND.flatten(1)[:, None]


def transformer_engine_attention() -> type:
    """The class of core attention for Transformer Engine's layers. Transformer Engine is imported here.

    Without a key-value cache it computes Transformer Engine's packed attention, with one `attend_rows`.
    """
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    class RowsTransformerEngineAttention(TEDotProductAttention):
        """TEDotProductAttention that accepts `TokenRows`."""

        def forward(self, query, key, value, attention_mask=None, *, packed_seq_params: TokenRows, **kwargs) -> Tensor:
            rows = packed_seq_params
            query, key, value = query[:, 0], key[:, 0], value[:, 0]
            # With context parallelism, Transformer Engine's attention is a collective of the ranks that share a row. A
            # call of sampling is of one copy of the weights alone.
            alone = rows.context is None and self.config.context_parallel_size > 1
            if rows.cache is not None or alone:
                scale = self.config.softmax_scale
                out_TND = attend_rows(query, key, value, rows=rows, layer=self.layer_number, scale=scale)
                return out_TND.flatten(1)[:, None]
            longest = max(rows.packed_lengths)
            packed = PackedSeqParams(
                qkv_format="thd",
                cu_seqlens_q=rows.begins,
                cu_seqlens_kv=rows.begins,
                max_seqlen_q=longest,
                max_seqlen_kv=longest,
            )
            out = super().forward(query, key, value, None, packed_seq_params=packed, **kwargs)
            return out.reshape(query.size(0), 1, -1)

    return RowsTransformerEngineAttention
