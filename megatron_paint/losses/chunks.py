"""How many tokens' logits exist at a time, and where rollouts are cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

# Vocabulary entries of one elementwise block: small enough for a CPU's second-level cache, large enough for a GPU.
_BLOCK_ELEMENTS = {"cpu": 2**18, "cuda": 2**23}
# Buffers of a block that live at the same time, at most.
_BLOCK_BUFFERS = 6


@dataclass(frozen=True)
class Chunk:
    """Rows [start, stop); whole lengths of the rollouts in it, or None where it is a piece of a longer one."""

    start: int
    stop: int
    lengths: tuple[int, ...] | None

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)


@dataclass(frozen=True)
class ChunkSize:
    """tokens: rows whose logits exist at a time; block_rows: rows that elementwise work takes at a time."""

    tokens: int
    block_rows: int


def plan_chunks(lengths: Sequence[int], chunk_tokens: int, *, whole_rollouts: bool) -> list[Chunk]:
    """Cut the rows into chunks of at most chunk_tokens.

    whole_rollouts keeps rollouts that fit together with others in one chunk; one that does not is cut into pieces of
    about equal size. Otherwise rollouts do not matter and every chunk claims to be whole.
    """
    if not whole_rollouts:
        return [Chunk(start, stop, (stop - start,)) for start, stop in _even(0, sum(lengths), chunk_tokens)]
    chunks: list[Chunk] = []
    start, held = 0, []
    for length in filter(None, lengths):
        if held and sum(held) + length > chunk_tokens:
            chunks.append(Chunk(start, start + sum(held), tuple(held)))
            start, held = start + sum(held), []
        if length > chunk_tokens:
            chunks += [Chunk(low, high, None) for low, high in _even(start, start + length, chunk_tokens)]
            start += length
        else:
            held.append(length)
    if sum(held):
        chunks.append(Chunk(start, start + sum(held), tuple(held)))
    return chunks


def chunk_size(
    chunk_tokens: int | None,
    chunk_bytes: float,
    *,
    columns: int,
    buffers: int,
    dtype: torch.dtype,
    device: torch.device,
) -> ChunkSize:
    """The given number of tokens, or as many as keep a chunk's buffers and an elementwise block within chunk_bytes.

    columns is the width of a shard, the same on all ranks of the vocabulary's group: they must agree on the answer.
    """
    columns = max(columns, 1)
    row_bytes = columns * dtype.itemsize
    block_rows = max(1, _BLOCK_ELEMENTS["cuda" if device.type == "cuda" else "cpu"] // columns)
    if chunk_tokens is not None:
        if isinstance(chunk_tokens, bool) or not isinstance(chunk_tokens, int) or chunk_tokens < 1:
            raise ValueError(f"chunk_tokens: got {chunk_tokens!r}; it counts tokens, 1 or more; None derives it")
        return ChunkSize(tokens=chunk_tokens, block_rows=block_rows)
    least = (buffers + _BLOCK_BUFFERS) * row_bytes
    if not least <= chunk_bytes < float("inf"):
        raise ValueError(
            f"chunk_bytes: got {chunk_bytes!r}; one token of {columns} columns takes {least:,} bytes; "
            f"set a finite number, {least:,} or more (1e9 is usual)"
        )
    block_rows = max(1, min(block_rows, int(chunk_bytes / 2) // (_BLOCK_BUFFERS * row_bytes)))
    tokens = int(chunk_bytes - block_rows * _BLOCK_BUFFERS * row_bytes) // (buffers * row_bytes)
    return ChunkSize(tokens=tokens, block_rows=block_rows)


def blocks(tokens: int, block_rows: int) -> Iterator[slice]:
    """Row blocks over which elementwise work goes, so that its temporaries stay small and, on a CPU, in cache."""
    return (slice(start, min(start + block_rows, tokens)) for start in range(0, tokens, block_rows))


def _even(start: int, stop: int, most: int) -> list[tuple[int, int]]:
    pieces = -(-(stop - start) // most)
    cuts = [start + (stop - start) * index // max(pieces, 1) for index in range(pieces + 1)]
    return list(pairwise(cuts))
