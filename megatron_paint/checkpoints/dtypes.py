"""Tools to copy numbers between files: blocks of rows, raw bytes, conversion to another type."""

from collections.abc import Iterator, Sequence
from math import prod

import torch
from torch import Tensor

from megatron_paint.base.errors import UserError

# A rank that needs one row of a piece reads the complete piece. The process keeps memory blocks of at most 32 MiB for
# the next piece. Larger blocks are mapped again each time, and their page faults cost 50 % more time.
PIECE_BYTES = 32 * 10**6


def row_blocks(shape: Sequence[int], most_bytes: int = PIECE_BYTES) -> Iterator[slice]:
    """Yields runs of rows of about equal size. Each has at most `most_bytes` of 2-byte numbers, or one row."""
    rows = shape[0]
    blocks = max(1, -(-prod(shape) * 2 // most_bytes))
    step = -(-rows // blocks)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def raw_bytes(values: Tensor) -> memoryview:
    """Returns the bytes of the numbers, as a file stores them."""
    return memoryview(values.contiguous().view(-1).view(torch.uint8).numpy())


def cast(values: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Converts the numbers of tensor `name` to another type. Raises UserError if a number is then not finite."""
    if values.dtype == dtype:
        return values
    rounded = values.to(dtype)
    if not torch.isfinite(values).all():
        raise UserError(f"{name} has infinite numbers or NaN; the checkpoint is damaged or its training diverged")
    if not torch.isfinite(rounded).all():
        largest = float(values.abs().max())
        kind = str(dtype).removeprefix("torch.")
        raise UserError(
            f"{name} has numbers up to {largest:.3g}, which {kind} cannot represent; convert to another type"
        )
    return rounded
