"""The tokens that teacher and student find likeliest, at each token of the samples that are kept.

Axes: N response tokens of a micro-batch, M those of its samples that are kept, H hidden size, K likeliest tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_paint.losses.interface import ResponseRows
from megatron_paint.losses.top_tokens import TopTokens, top_tokens
from megatron_paint.records import LikelyTokens


def likely_tokens(
    rows: ResponseRows, indices: Sequence[int], *, kept: int, count: int, chunk_bytes: float
) -> dict[int, dict[str, LikelyTokens]]:
    """The `count` likeliest tokens of each side, by the index of the sample in its step, for indices below `kept`.

    indices: of the micro-batch's samples, in the order of the rows. All ranks of the vocabulary call it together.
    """
    chosen = [index for index in indices if index < kept] if count else []
    if not chosen:
        return {}
    lengths = [length for index, length in zip(indices, rows.lengths, strict=True) if index < kept]
    weight_VH, teacher_weight_VH = rows.output_weight_VH, rows.teacher_output_weight_VH
    sides = {"student": (rows.student_hidden_NH, weight_VH)}
    if rows.teacher_hidden_NH is not None:
        sides["teacher"] = (rows.teacher_hidden_NH, weight_VH if teacher_weight_VH is None else teacher_weight_VH)
    found: dict[int, dict[str, LikelyTokens]] = {index: {} for index in chosen}
    for side, (hidden_NH, side_weight_VH) in sides.items():
        hidden_MH = _rows_of_kept(hidden_NH.detach(), indices, rows.lengths, kept)
        top = top_tokens(hidden_MH, side_weight_VH, vocab=rows.vocab, count=count, chunk_bytes=chunk_bytes)
        for index, tokens in zip(chosen, _by_sample(top, lengths), strict=True):
            found[index][side] = tokens
    return found


def _rows_of_kept(hidden_NH: Tensor, indices: Sequence[int], lengths: Sequence[int], kept: int) -> Tensor:
    parts = zip(indices, hidden_NH.split(list(lengths)), strict=True)
    return torch.cat([part for index, part in parts if index < kept])


def _by_sample(top: TopTokens, lengths: Sequence[int]) -> list[LikelyTokens]:
    ids, probabilities = top.ids_TK.cpu().split(lengths), top.probability_TK.cpu().split(lengths)
    return [
        LikelyTokens(ids=tuple(map(tuple, own_ids.tolist())), probabilities=tuple(map(tuple, shares.tolist())))
        for own_ids, shares in zip(ids, probabilities, strict=True)
    ]
