"""The elementwise work of token_logprobs: its interface, and its torch backend.

Logits are divided by the temperature. Axes: T tokens, V this rank's vocabulary columns, K packed statistics.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from megatron_paint.losses.elementwise.softmax_statistics import Softmax, TokenQuery, centred_statistics, token_logits
from megatron_paint.losses.output_layer.chunks import Scratch, tiles


@dataclass(kw_only=True)
class TokenLogits:
    """Logits of a chunk; shift_T: the amount subtracted from each row of the buffer so far; None: nothing."""

    values_TV: torch.Tensor
    shift_T: torch.Tensor | None = None


class TokenPasses(Protocol):
    """The elementwise passes over a chunk's logits; they may overwrite the logits."""

    def statistics(self, logits: TokenLogits, query: TokenQuery) -> torch.Tensor:
        """[T, 4] of this rank's columns: maximum, sum and weighted sum as in centred_statistics; the token's logit, 0
        if another rank has it."""

    def gradient(self, logits: TokenLogits, query: TokenQuery, total: Softmax, scale_T: torch.Tensor) -> torch.Tensor:
        """scale ([v is the token] - p) [T, V], p: the softmax over all ranks, normalised by total."""


class TorchTokenPasses:
    """Implements TokenPasses; elements: vocabulary entries of a tile. The gradient overwrites the logits."""

    def __init__(self, *, elements: int) -> None:
        self.elements = elements
        self._scratch = Scratch()

    def statistics(self, logits: TokenLogits, query: TokenQuery) -> torch.Tensor:
        values_TV = logits.values_TV
        logit_T = values_TV.new_zeros(len(values_TV))
        if values_TV.shape[1]:
            logit_T = token_logits(values_TV, query)
        local_TK = centred_statistics(values_TV, self.elements, self._scratch)
        logits.shift_T = local_TK[:, 0].clone()
        return torch.cat((local_TK, logit_T[:, None]), dim=1)

    def gradient(self, logits: TokenLogits, query: TokenQuery, total: Softmax, scale_T: torch.Tensor) -> torch.Tensor:
        values_TV = logits.values_TV
        max_T = total.max_T if logits.shift_T is None else total.max_T - logits.shift_T
        factor_T = -scale_T / total.sum_T
        for rows, columns in tiles(values_TV, self.elements):
            values_TV[rows, columns].sub_(max_T[rows, None]).exp_().mul_(factor_T[rows, None])
        if values_TV.shape[1]:
            here_T = torch.where(query.here_T, scale_T, 0.0)
            values_TV.scatter_add_(1, query.column_T[:, None], here_T[:, None])
        return values_TV
