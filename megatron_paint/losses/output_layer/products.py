"""The output layer's matrix products; logits and their gradient are float32 or float64 for inputs of any type.

bfloat16 inputs are multiplied exactly and summed in float32: a product rounded to bfloat16 would drown the small
differences between a model and itself. Axes: T tokens, V this rank's vocabulary columns, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch

from megatron_paint.losses.output_layer.main_grad import main_grad_of

# Bytes of one vocabulary tile if a product must be cast or cannot be accumulated in place.
TILE_BYTES = 64_000_000


class Projection:
    """scale hidden weight^T as logits [T, V] in dtype; on a CPU a call overwrites the result of `buffers` calls ago.

    On a CPU new memory for every chunk would cost as much in page faults as the arithmetic on it.
    """

    def __init__(
        self, weight_VH: torch.Tensor, dtype: torch.dtype, *, most_rows: int, scale: float = 1.0, buffers: int = 1
    ) -> None:
        self.weight_VH, self.dtype, self.scale = weight_VH, dtype, scale
        self._most_rows = most_rows
        self._buffers: list[torch.Tensor | None] = [None] * buffers

    def __call__(self, hidden_TH: torch.Tensor) -> torch.Tensor:
        weight_VH, dtype = self.weight_VH, self.dtype
        if _is_half_on_cuda(hidden_TH, dtype) and hidden_TH.dtype == weight_VH.dtype:
            logits_TV = torch.mm(hidden_TH, weight_VH.t(), out_dtype=dtype)
            return logits_TV if self.scale == 1.0 else logits_TV.mul_(self.scale)
        logits_TV = self._rows(hidden_TH)
        cast = not hidden_TH.dtype == weight_VH.dtype == dtype
        for tile in _tiles(weight_VH, tokens=0) if cast else [slice(None)]:
            # The product applies the scale, which saves a pass over the logits. beta 0: the old values are not read.
            part_TV = logits_TV[:, tile]
            weight_HV = weight_VH[tile].to(dtype).t()
            torch.addmm(part_TV, hidden_TH.to(dtype), weight_HV, beta=0.0, alpha=self.scale, out=part_TV)
        return logits_TV

    def _rows(self, hidden_TH: torch.Tensor) -> torch.Tensor:
        if hidden_TH.is_cuda:
            return hidden_TH.new_empty((len(hidden_TH), len(self.weight_VH)), dtype=self.dtype)
        buffer_TV = self._buffers.pop(0)
        if buffer_TV is None:
            buffer_TV = hidden_TH.new_empty((self._most_rows, len(self.weight_VH)), dtype=self.dtype)
        self._buffers.append(buffer_TV)
        return buffer_TV[: len(hidden_TH)]


def inverse(temperature: float, dtype: torch.dtype) -> float:
    """The factor that scales logits of this type as a division by the temperature does."""
    return 1.0 / float(torch.tensor(temperature, dtype=dtype))


def backproject(dlogits_TV: torch.Tensor, weight_VH: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """dlogits weight: the hidden states' gradient [T, H] in dtype."""
    if dlogits_TV.dtype == weight_VH.dtype == dtype:
        return torch.mm(dlogits_TV, weight_VH)
    half = takes_half_gradients(weight_VH, dtype)
    if half and dlogits_TV.dtype == weight_VH.dtype:
        return torch.mm(dlogits_TV, weight_VH, out_dtype=dtype)
    dhidden_TH = dlogits_TV.new_zeros((dlogits_TV.shape[0], weight_VH.shape[1]), dtype=dtype)
    for tile in _tiles(weight_VH, tokens=dlogits_TV.shape[0]):
        if half:
            dhidden_TH += torch.mm(dlogits_TV[:, tile].to(weight_VH.dtype), weight_VH[tile], out_dtype=dtype)
        else:
            dhidden_TH.addmm_(dlogits_TV[:, tile].to(dtype), weight_VH[tile].to(dtype))
    return dhidden_TH


class WeightGradient:
    """The output weight's gradient, summed over a call's chunks in float32 or float64.

    It is stored outside the parameter until backward: only then is the factor of all tokens known (a loss scale). A
    call without a backward, such as the first pass of an activation checkpoint, changes nothing.
    """

    def __init__(self, weight_VH: torch.Tensor, *, columns: int, dtype: torch.dtype) -> None:
        """Rows of the gradient after the first `columns` are padding and stay 0."""
        self._weight_VH = weight_VH
        self.total_VH = torch.zeros(weight_VH.shape, dtype=dtype, device=weight_VH.device)
        self._valid_VH = self.total_VH[:columns]

    def add(self, dlogits_TV: torch.Tensor, hidden_TH: torch.Tensor) -> None:
        """Adds dlogits^T hidden."""
        dtype = self.total_VH.dtype
        if hidden_TH.dtype == dtype or not takes_half_gradients(hidden_TH, dtype):
            self._valid_VH.addmm_(dlogits_TV.to(dtype).t(), hidden_TH.to(dtype))
            return
        in_place = _accumulates_half_products()
        for tile in _tiles(self._valid_VH, tokens=dlogits_TV.shape[0]):
            part_VT, sum_VH = dlogits_TV[:, tile].to(hidden_TH.dtype).t(), self._valid_VH[tile]
            if in_place:
                torch.addmm(sum_VH, part_VT, hidden_TH, out_dtype=dtype, out=sum_VH)
            else:
                sum_VH += torch.mm(part_VT, hidden_TH, out_dtype=dtype)

    def release(self, factor: float) -> torch.Tensor:
        """The gradient for autograd: factor times the sum, or zeros if Megatron's buffer got it; call this once."""
        total_VH, self.total_VH = self.total_VH, self.total_VH.new_empty(0)
        main_grad_VH = main_grad_of(self._weight_VH)
        if main_grad_VH is None:
            return (total_VH if factor == 1.0 else total_VH.mul_(factor)).to(self._weight_VH.dtype)
        main_grad_VH[: len(self._valid_VH)].add_(self._valid_VH, alpha=factor)
        self._weight_VH.grad_added_to_main_grad = True
        return torch.zeros_like(self._weight_VH)


class OutputLayerGradient:
    """The gradients of hidden states and output weight, computed from the logits' gradient, some rows at a time."""

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
        self._dtype = dtype
        self.dhidden_TH = hidden_TH.new_zeros(hidden_TH.shape, dtype=dtype) if wants[0] else None
        self.weight = WeightGradient(weight_VH, columns=columns, dtype=dtype) if wants[1] else None

    @property
    def dlogits_dtype(self) -> torch.dtype:
        """The type in which the logits' gradient enters the products."""
        halves = [takes_half_gradients(part, self._dtype) for part in (self._hidden_TH, self._weight_VH)]
        return torch.bfloat16 if all(halves) else self._dtype

    def put(
        self, rows: slice | torch.Tensor, dlogits_TV: torch.Tensor, replaced_TV: torch.Tensor | None = None
    ) -> None:
        """Sets these rows' gradient. replaced_TV: the value of an earlier put() of the same rows, or None."""
        if self.dhidden_TH is not None:
            self.dhidden_TH[rows] = backproject(dlogits_TV, self._weight_VH, self._dtype)
        if self.weight is not None:
            change_TV = dlogits_TV if replaced_TV is None else dlogits_TV - replaced_TV
            self.weight.add(change_TV, self._hidden_TH[rows])


def takes_half_gradients(values: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether products with such values use the logits' gradient rounded to bfloat16.

    The range of float16 is too small for the gradient of a probability.
    """
    return _is_half_on_cuda(values, dtype) and values.dtype == torch.bfloat16


def _is_half_on_cuda(values: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether dtype is float32 and one call can sum and return products of such values in float32."""
    return values.is_cuda and values.dtype in (torch.bfloat16, torch.float16) and dtype == torch.float32


@cache
def _accumulates_half_products() -> bool:
    """Whether this torch adds bfloat16 products to a float32 matrix in place, which saves a third of the traffic."""
    ones = torch.ones(16, 16, dtype=torch.bfloat16, device="cuda")
    total = torch.ones(16, 16, device="cuda")
    try:
        torch.addmm(total, ones, ones, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return bool((total == 17.0).all())


def _tiles(weight_VH: torch.Tensor, *, tokens: int) -> Iterator[slice]:
    columns, hidden = weight_VH.shape
    step = max(1, TILE_BYTES // (8 * max(hidden, tokens, 1)))
    return (slice(start, min(start + step, columns)) for start in range(0, columns, step))
