"""Computes how many tokens' logits exist at a time, and where rollouts are cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

# Vocabulary entries of one tile: its temporaries fit into a CPU's second-level cache; a GPU needs few launches.
_TILE_ELEMENTS = {"cpu": 2**17, "cuda": 2**23}
# Rows of a chunk of short rollouts on a CPU: 256 take 1.02 x the time of 512 for each row, and half the memory. Ours.
_ENOUGH_ROWS_OF_A_CPU = 256
# The most buffers of a tile that exist at the same time.
_TILE_BUFFERS = 6


@dataclass(frozen=True)
class Chunk:
    """Rows [start, stop); lengths of the complete rollouts in it, or None if it is a piece of a longer rollout."""

    start: int
    stop: int
    lengths: tuple[int, ...] | None

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)


@dataclass(frozen=True)
class ChunkSize:
    """How much exists at a time.

    tokens: rows of the largest chunk; together: rows up to which a chunk is filled with several rollouts, or with rows
    of any rollouts; elements: vocabulary entries that are processed at a time.
    """

    tokens: int
    together: int
    elements: int


def plan_chunks(
    lengths: Sequence[int], chunk_tokens: int, *, whole_rollouts: bool, together: int | None = None
) -> list[Chunk]:
    """Cuts the rows into chunks of at most chunk_tokens.

    whole_rollouts: a rollout that fits into a chunk is not cut, and may share a chunk with others, which then has at
    most `together` rows (None: chunk_tokens); a longer one is cut into pieces of about equal size. Otherwise rollouts
    are ignored, and every chunk counts as complete and has at most `together` rows.
    """
    together = chunk_tokens if together is None else together
    if not whole_rollouts:
        return [Chunk(start, stop, (stop - start,)) for start, stop in _even(0, sum(lengths), together)]
    chunks: list[Chunk] = []
    start, held = 0, []
    for length in filter(None, lengths):
        if held and sum(held) + length > together:
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
    """chunk_tokens if passed, otherwise as many as keep a chunk's buffers and an elementwise tile within chunk_bytes.

    columns is the width of a shard, the same on all ranks of the vocabulary's group: they must compute the same result.
    """
    row_bytes = max(columns, 1) * dtype.itemsize
    elements = _TILE_ELEMENTS["cuda" if device.type == "cuda" else "cpu"]
    if chunk_tokens is not None:
        if isinstance(chunk_tokens, bool) or not isinstance(chunk_tokens, int) or chunk_tokens < 1:
            raise ValueError(f"chunk_tokens: got {chunk_tokens!r}; it counts tokens, 1 or more; None derives it")
        return ChunkSize(tokens=chunk_tokens, together=chunk_tokens, elements=elements)
    least = 2 * buffers * row_bytes
    if not least <= chunk_bytes < float("inf"):
        raise ValueError(
            f"chunk_bytes: got {chunk_bytes!r}; one token of {columns} columns takes {least:,} bytes; "
            f"set a finite number, {least:,} or more (1e9 is usual)"
        )
    tile_row_bytes = _TILE_BUFFERS * dtype.itemsize
    elements = max(1, min(elements, int(chunk_bytes / 2) // tile_row_bytes))
    tokens = max(1, int(chunk_bytes - elements * tile_row_bytes) // (buffers * row_bytes))
    together = tokens if device.type == "cuda" else min(tokens, _ENOUGH_ROWS_OF_A_CPU)
    return ChunkSize(tokens=tokens, together=together, elements=elements)


def elements_of_tile(size: ChunkSize, device: torch.device) -> int:
    """One tile for each thread; ranks may have different numbers of threads, but chunks of equal size."""
    return size.elements * (torch.get_num_threads() if device.type == "cpu" else 1)


def tiles(values_TV: torch.Tensor, elements: int) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of tiles of about this many elements: complete rows if they fit."""
    tokens, columns = values_TV.shape
    height = max(1, elements // max(columns, 1))
    pieces = max(1, -(-columns // elements))
    width = -(-columns // pieces)
    for start in range(0, tokens, height):
        for left in range(0, columns, max(width, 1)):
            yield slice(start, min(start + height, tokens)), slice(left, min(left + width, columns))


class Scratch:
    """Memory that the temporaries of tiles share: on a CPU new memory costs twice as much as an exponential."""

    def __init__(self) -> None:
        self._memory: torch.Tensor | None = None

    def like(self, tile_TV: torch.Tensor) -> torch.Tensor:
        """A tensor of the tile's shape; it overwrites the last one."""
        count = tile_TV.numel()
        if self._memory is None or self._memory.numel() < count:
            self._memory = tile_TV.new_empty(count)
        return self._memory[:count].view(tile_TV.shape)


def _even(start: int, stop: int, most: int) -> list[tuple[int, int]]:
    pieces = -(-(stop - start) // most)
    cuts = [start + (stop - start) * index // max(pieces, 1) for index in range(pieces + 1)]
    return list(pairwise(cuts))
