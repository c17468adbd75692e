"""Attention over packed rows, with a key-value cache for sampling: one code path for training and generation.

A call's tokens stand one behind another, rows concatenated without padding: hidden states are [T, 1, H]. Everything in
the network except attention works on single tokens, so only this file knows rows. `TokenRows` travels down the layers
as Megatron's `packed_seq_params`: as an argument, so that activation recomputation sees the right one.

Axes: T tokens of the call, R rows, S longest row, K keys, N heads of this rank, G key-value groups of this rank, D head
size. Megatron's static inference context has one offset for a whole batch and differs between its versions; rows of
different lengths and pipeline stages need one offset a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from torch import Tensor


class KeyValueCache:
    """Keys and values of all layers of a stage, [R, K, G, D] each; grows as rows grow."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def write(self, layer: int, key_TGD: Tensor, value_TGD: Tensor, rows: "TokenRows") -> tuple[Tensor, Tensor]:
        """Stores the call's keys and values at their rows and positions; returns all that the layer holds."""
        keys_RKGD, values_RKGD = self._reserve(layer, key_TGD, len(rows.lengths), rows.end)
        keys_RKGD[rows.row_T, rows.position_T] = key_TGD
        values_RKGD[rows.row_T, rows.position_T] = value_TGD
        return keys_RKGD, values_RKGD

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Drops all rows but these, in this order."""
        for layer, (keys, values) in self.layers.items():
            index = torch.tensor(rows, device=keys.device)
            self.layers[layer] = (keys[index], values[index])

    def _reserve(self, layer: int, like_TGD: Tensor, rows: int, length: int) -> tuple[Tensor, Tensor]:
        held = self.layers.get(layer)
        if held is not None and held[0].size(0) >= rows and held[0].size(1) >= length:
            return held
        held_rows, held_length = held[0].shape[:2] if held is not None else (0, 0)
        # Doubling keeps the copies of a response of n tokens at about n.
        capacity = length if length <= held_length else max(length, 2 * held_length)
        shape = (max(rows, held_rows), max(capacity, held_length), *like_TGD.shape[1:])
        grown = (like_TGD.new_zeros(shape), like_TGD.new_zeros(shape))
        if held is not None:
            for new, old in zip(grown, held, strict=True):
                new[:held_rows, :held_length] = old
        self.layers[layer] = grown
        return grown


@dataclass(frozen=True, kw_only=True)
class TokenRows:
    """Where each token of a call stands: its row, its place among the call's tokens of that row, its position."""

    lengths: tuple[int, ...]  # the call's tokens in each row
    row_T: Tensor
    slot_T: Tensor
    position_T: Tensor  # slot_T plus what the cache holds of the row already
    end: int  # one past the largest position
    cache: KeyValueCache | None = None
    continues: bool = False  # the cache holds earlier tokens of the rows
    qkv_format: str = "rows"  # not "thd": Megatron's layers then leave the tensors alone
    tokens_per_sample: None = None  # read by Megatron's MoE layers

    def cumulative_lengths(self) -> Tensor:
        """[R + 1] int32: where each row begins in T, as packed attention kernels want it."""
        lengths = torch.tensor((0, *self.lengths), device=self.row_T.device)
        return lengths.cumsum(0).to(torch.int32)


def token_rows(
    lengths: Sequence[int],
    *,
    device: torch.device,
    starts: Sequence[int] | None = None,
    cache: KeyValueCache | None = None,
) -> TokenRows:
    """Rows of the given numbers of new tokens; `starts` counts what the cache holds of each, None where it is empty."""
    lengths_R = torch.tensor(lengths, dtype=torch.int64)
    row_T = torch.repeat_interleave(torch.arange(len(lengths)), lengths_R)
    begin_R = lengths_R.cumsum(0) - lengths_R
    slot_T = torch.arange(int(lengths_R.sum())) - begin_R[row_T]
    position_T = slot_T if starts is None else slot_T + torch.tensor(starts, dtype=torch.int64)[row_T]
    return TokenRows(
        lengths=tuple(lengths),
        row_T=row_T.to(device),
        slot_T=slot_T.to(device),
        position_T=position_T.to(device),
        end=int(position_T.max()) + 1,
        cache=cache,
        continues=starts is not None,
    )


def attend_rows(query_TND: Tensor, key_TGD: Tensor, value_TGD: Tensor, *, rows: TokenRows, layer: int) -> Tensor:
    """Causal grouped-query attention of each row's new tokens over all of the row: [T, N, D].

    Rows are spread into a rectangle for torch's kernel; what pads it is never read back.
    """
    if rows.cache is not None:
        keys_RKGD, values_RKGD = rows.cache.write(layer, key_TGD, value_TGD, rows)
    query_RSND = _spread(query_TND, rows)
    if rows.continues:
        used = rows.end
        last_R1 = _spread(rows.position_T, rows)
        visible_RSK = torch.arange(used, device=last_R1.device) <= last_R1[..., None]
        keys, values = keys_RKGD[: len(rows.lengths), :used], values_RKGD[: len(rows.lengths), :used]
        mask = visible_RSK[:, None]
    else:
        keys, values, mask = _spread(key_TGD, rows), _spread(value_TGD, rows), None
    out_RNSD = F.scaled_dot_product_attention(
        query_RSND.transpose(1, 2),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=True,
    )
    return out_RNSD.transpose(1, 2)[rows.row_T, rows.slot_T]


def _spread(values_T: Tensor, rows: TokenRows) -> Tensor:
    """[T, ...] -> [R, S, ...], zero where a row is shorter than the longest."""
    rectangle = values_T.new_zeros((len(rows.lengths), max(rows.lengths), *values_T.shape[1:]))
    return rectangle.index_put((rows.row_T, rows.slot_T), values_T)


class LocalAttention(MegatronModule):
    """Core attention in plain torch, for machines without Transformer Engine and as the reference beside it."""

    def __init__(self, config, layer_number, attn_mask_type, attention_type, **unused):
        super().__init__(config=config)
        self.layer_number = layer_number

    def forward(self, query, key, value, attention_mask=None, *, packed_seq_params: TokenRows, **unused) -> Tensor:
        """query [T, 1, N, D], key and value [T, 1, G, D] -> [T, 1, N * D]."""
        out_TND = attend_rows(query[:, 0], key[:, 0], value[:, 0], rows=packed_seq_params, layer=self.layer_number)
        return out_TND.flatten(1)[:, None]


def transformer_engine_attention() -> type:
    """Transformer Engine's packed attention, and ours where a cache is read; imported only where it is used."""
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    class RowsTransformerEngineAttention(TEDotProductAttention):
        """TEDotProductAttention that takes `TokenRows`."""

        def forward(self, query, key, value, attention_mask=None, *, packed_seq_params: TokenRows, **kwargs) -> Tensor:
            rows = packed_seq_params
            query, key, value = query[:, 0], key[:, 0], value[:, 0]
            if rows.cache is not None:
                return attend_rows(query, key, value, rows=rows, layer=self.layer_number).flatten(1)[:, None]
            begins = rows.cumulative_lengths()
            packed = PackedSeqParams(
                qkv_format="thd",
                cu_seqlens_q=begins,
                cu_seqlens_kv=begins,
                max_seqlen_q=max(rows.lengths),
                max_seqlen_kv=max(rows.lengths),
            )
            out = super().forward(query, key, value, None, packed_seq_params=packed, **kwargs)
            return out.reshape(query.size(0), 1, -1)

    return RowsTransformerEngineAttention
