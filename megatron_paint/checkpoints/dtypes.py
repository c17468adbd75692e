"""Numbers on their way from one file to another: in blocks of rows, as bytes, in another type."""

from collections.abc import Iterator, Sequence
from math import prod

import torch
from torch import Tensor

from megatron_paint.base.errors import UserError

# What a rank that wants any row of a piece has to read. Memory of at most 32 MiB stays with the process for the next
# block; larger ones are mapped anew each time, and their page faults cost half as much again.
PIECE_BYTES = 32 * 10**6


def row_blocks(shape: Sequence[int], most_bytes: int = PIECE_BYTES) -> Iterator[slice]:
    """Runs of rows of about equal size, none above `most_bytes` of 2-byte numbers (or one row)."""
    rows = shape[0]
    blocks = max(1, -(-prod(shape) * 2 // most_bytes))
    step = -(-rows // blocks)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def raw_bytes(values: Tensor) -> memoryview:
    """The numbers as they stand in a file."""
    return memoryview(values.contiguous().view(-1).view(torch.uint8).numpy())


def cast(values: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """The numbers of tensor `name` in another type; UserError where one of them is not finite then."""
    if values.dtype == dtype:
        return values
    rounded = values.to(dtype)
    if not torch.isfinite(values).all():
        raise UserError(f"{name} holds infinite numbers or NaN; the checkpoint is damaged or its training diverged")
    if not torch.isfinite(rounded).all():
        largest = float(values.abs().max())
        kind = str(dtype).removeprefix("torch.")
        raise UserError(f"{name} holds numbers up to {largest:.3g}, which {kind} cannot; convert to another type")
    return rounded
