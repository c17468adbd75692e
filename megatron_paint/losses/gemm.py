"""The output layer's matrix products with logits and their gradient in float32 or float64, whatever the inputs are.

bfloat16 inputs are multiplied exactly and summed in float32: a product rounded to bfloat16 would drown the small
differences between a model and itself. Axes: T tokens, V this rank's vocabulary columns, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

# Bytes of one vocabulary tile where a product has to be cast or cannot be accumulated in place.
TILE_BYTES = 64_000_000


class Projection:
    """hidden weight^T as logits [T, V] in dtype; on a CPU each call writes over the result of the one before.

    Fresh memory for every chunk would cost a CPU as much in page faults as the arithmetic on it.
    """

    def __init__(self, weight_VH: torch.Tensor, dtype: torch.dtype, *, most_rows: int) -> None:
        self.weight_VH, self.dtype = weight_VH, dtype
        self._most_rows = most_rows
        self._buffer_TV: torch.Tensor | None = None

    def __call__(self, hidden_TH: torch.Tensor) -> torch.Tensor:
        weight_VH, dtype = self.weight_VH, self.dtype
        if _is_half_on_cuda(hidden_TH, dtype) and hidden_TH.dtype == weight_VH.dtype:
            return torch.mm(hidden_TH, weight_VH.t(), out_dtype=dtype)
        logits_TV = self._rows(hidden_TH)
        if hidden_TH.dtype == weight_VH.dtype == dtype:
            return torch.mm(hidden_TH, weight_VH.t(), out=logits_TV)
        hidden_TH = hidden_TH.to(dtype)
        for tile in _tiles(weight_VH, tokens=0):
            logits_TV[:, tile] = torch.mm(hidden_TH, weight_VH[tile].to(dtype).t())
        return logits_TV

    def _rows(self, hidden_TH: torch.Tensor) -> torch.Tensor:
        if hidden_TH.is_cuda:
            return hidden_TH.new_empty((len(hidden_TH), len(self.weight_VH)), dtype=self.dtype)
        if self._buffer_TV is None:
            self._buffer_TV = hidden_TH.new_empty((self._most_rows, len(self.weight_VH)), dtype=self.dtype)
        return self._buffer_TV[: len(hidden_TH)]


def backproject(dlogits_TV: torch.Tensor, weight_VH: torch.Tensor) -> torch.Tensor:
    """dlogits weight: the hidden states' gradient [T, H] in the dtype of dlogits."""
    if dlogits_TV.dtype == weight_VH.dtype:
        return torch.mm(dlogits_TV, weight_VH)
    dhidden_TH = dlogits_TV.new_zeros((dlogits_TV.shape[0], weight_VH.shape[1]))
    half = _takes_half_gradients(weight_VH, dlogits_TV.dtype)
    for tile in _tiles(weight_VH, tokens=dlogits_TV.shape[0]):
        if half:
            part_TV = dlogits_TV[:, tile].to(weight_VH.dtype)
            dhidden_TH += torch.mm(part_TV, weight_VH[tile], out_dtype=dlogits_TV.dtype)
        else:
            dhidden_TH.addmm_(dlogits_TV[:, tile], weight_VH[tile].to(dlogits_TV.dtype))
    return dhidden_TH


class WeightGradient:
    """The output weight's gradient, summed over chunks in float32 or float64.

    This is the one place where chunks meet the weight's gradient: a buffer that outlives the call goes in here.
    """

    def __init__(self, weight_VH: torch.Tensor, *, columns: int, dtype: torch.dtype) -> None:
        """Rows of the gradient beyond the first `columns` stay 0: they are padding."""
        self.total_VH = torch.zeros(weight_VH.shape, dtype=dtype, device=weight_VH.device)
        self._valid_VH = self.total_VH[:columns]

    def add(self, dlogits_TV: torch.Tensor, hidden_TH: torch.Tensor) -> None:
        """Add dlogits^T hidden."""
        if hidden_TH.dtype == dlogits_TV.dtype or not _takes_half_gradients(hidden_TH, dlogits_TV.dtype):
            self._valid_VH.addmm_(dlogits_TV.t(), hidden_TH.to(dlogits_TV.dtype))
            return
        for tile in _tiles(self._valid_VH, tokens=dlogits_TV.shape[0]):
            part_TV = dlogits_TV[:, tile].to(hidden_TH.dtype)
            self._valid_VH[tile] += torch.mm(part_TV.t(), hidden_TH, out_dtype=dlogits_TV.dtype)


class OutputLayerGradient:
    """The gradients of hidden states and output weight, filled rows by rows with the logits' gradient."""

    def __init__(
        self,
        hidden_TH: torch.Tensor,
        weight_VH: torch.Tensor,
        *,
        columns: int,
        dtype: torch.dtype,
        wants: tuple[bool, bool],
    ) -> None:
        """columns: the weight's rows without padding; wants: whether (hidden states, weight) need a gradient."""
        self._hidden_TH, self._weight_VH = hidden_TH.detach(), weight_VH.detach()[:columns]
        self.dhidden_TH = hidden_TH.new_zeros(hidden_TH.shape, dtype=dtype) if wants[0] else None
        self.weight = WeightGradient(weight_VH, columns=columns, dtype=dtype) if wants[1] else None

    def put(
        self, rows: slice | torch.Tensor, dlogits_TV: torch.Tensor, replaced_TV: torch.Tensor | None = None
    ) -> None:
        """Set these rows' gradient, given what an earlier put() of the same rows had (None: no earlier one)."""
        if self.dhidden_TH is not None:
            self.dhidden_TH[rows] = backproject(dlogits_TV, self._weight_VH)
        if self.weight is not None:
            change_TV = dlogits_TV if replaced_TV is None else dlogits_TV - replaced_TV
            self.weight.add(change_TV, self._hidden_TH[rows])


def _is_half_on_cuda(values: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether a product of such values can be summed and given in float32 by one call, and dtype is that."""
    return values.is_cuda and values.dtype in (torch.bfloat16, torch.float16) and dtype == torch.float32


def _takes_half_gradients(values: torch.Tensor, dtype: torch.dtype) -> bool:
    # float16 has too small a range for the gradient of a probability.
    return _is_half_on_cuda(values, dtype) and values.dtype == torch.bfloat16


def _tiles(weight_VH: torch.Tensor, *, tokens: int) -> Iterator[slice]:
    columns, hidden = weight_VH.shape
    step = max(1, TILE_BYTES // (8 * max(hidden, tokens, 1)))
    return (slice(start, min(start + step, columns)) for start in range(0, columns, step))
