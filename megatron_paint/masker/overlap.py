"""The overlap masker's score: how much of a verified solution a rollout reproduces. Text in, numbers out, no model.

Recall of anchors (boxed answers, formulas, key numbers) as in PAINT (arXiv 2604.26573); the rules are ours. What is
shown for a given overlap is decided in reveal.py.
"""

import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from typing import Any, NamedTuple

from megatron_paint.base.errors import UserError
from megatron_paint.masker.anchors import extract_math, find_math
from megatron_paint.records import Anchor, Overlap
from megatron_paint.runtime.processes import start_worker

# From here on a pool is used (ours), about 0.1 s of work. benchmarks/masker.py: on two busy cores a step of 0.6 million
# characters took as long with two workers as without; the pool's own cost to this process is an eighth of the work.
POOL_CHARACTERS = 1_000_000
CACHED_SOLUTIONS = 1024

Found = tuple[str, str, bool]  # kind, text, found: travels between processes faster than an Anchor


@dataclass(frozen=True)
class AnchorExtractor:
    """What a domain counts as an anchor: two pure module-level functions, so that worker processes can import them.

    `extract(problem, solution)` gives the anchors, each with `.kind` and normalised `.text`, without repeats;
    `find(anchors, rollout)` says of each whether the rollout holds it.
    """

    extract: Callable[[str, str], tuple[Any, ...]]
    find: Callable[[tuple[Any, ...], str], tuple[bool, ...]]


EXTRACTORS: dict[str, AnchorExtractor] = {"math": AnchorExtractor(extract_math, find_math)}


class Pair(NamedTuple):
    """What one overlap is measured on."""

    problem: str
    solution: str
    rollout: str


def register_extractor(name: str, extractor: AnchorExtractor) -> None:
    """Adds a domain under the name that `objective.reveal.anchors` then takes."""
    EXTRACTORS[name] = extractor


def measure_overlap(*, problem: str, solution: str, rollout: str, anchors: str = "math") -> Overlap:
    """The share of the solution's anchors that stand in the rollout, in [0, 1]; 0 without anchors.

    Anchors that the problem gives away are not counted. Errors: UserError for an unknown extractor name.
    """
    return _measure(_extractor(anchors), Pair(problem, solution, rollout))


def measure_overlaps(
    pairs: Sequence[Pair], *, anchors: str = "math", pool: "MaskerPool | None" = None
) -> list[Overlap]:
    """The overlap of each pair, in order; in worker processes where a pool is given and there is enough to do."""
    extractor = _extractor(anchors)
    if pool is not None and sum(map(_size, pairs)) >= pool.from_characters:
        return pool.measure(pairs, extractor)
    return [_measure(extractor, pair) for pair in pairs]


class MaskerPool:
    """Worker processes for the masker, started (by spawn) at the first use and kept until `close`.

    Results are those of the serial loop. Where worker processes cannot run, it says so once and goes on without them.
    """

    def __init__(self, workers: int, *, from_characters: int = POOL_CHARACTERS):
        if workers < 1:
            raise UserError(f"the masker's pool has {workers} workers; it needs at least 1")
        self.workers = workers
        self.from_characters = from_characters
        self._executor: ProcessPoolExecutor | None = None
        self._broken = False

    def measure(self, pairs: Sequence[Pair], extractor: AnchorExtractor) -> list[Overlap]:
        """The overlap of each pair, in order."""
        if not self._broken:
            if self._executor is None:
                self._executor = ProcessPoolExecutor(
                    self.workers, mp_context=get_context("spawn"), initializer=start_worker
                )
            chunks = _chunks(pairs, 4 * self.workers)
            try:
                results = self._executor.map(_find_in_chunk, [extractor] * len(chunks), chunks)
                return [_overlap(found) for chunk in results for found in chunk]
            except BrokenProcessPool as error:
                self._broken = True
                warnings.warn(f"the masker goes on in one process: its workers died ({error})", stacklevel=2)
        return [_measure(extractor, pair) for pair in pairs]

    def close(self) -> None:
        """Ends the worker processes."""
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)
            self._executor = None

    def __enter__(self) -> "MaskerPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _extractor(name: str) -> AnchorExtractor:
    if name not in EXTRACTORS:
        raise UserError(
            f"objective.reveal.anchors: no anchor extractor is called {name!r}; there are "
            f"{', '.join(sorted(EXTRACTORS))} (register_extractor adds one)"
        )
    return EXTRACTORS[name]


def _measure(extractor: AnchorExtractor, pair: Pair) -> Overlap:
    return _overlap(_find(extractor, pair))


def _find(extractor: AnchorExtractor, pair: Pair) -> list[Found]:
    marks = _extract(extractor, pair.problem, pair.solution)
    hits = extractor.find(marks, pair.rollout)
    return [(mark.kind, mark.text, hit) for mark, hit in zip(marks, hits, strict=True)]


def _overlap(found: list[Found]) -> Overlap:
    anchors = tuple(Anchor(kind=kind, text=text, found=hit) for kind, text, hit in found)
    return Overlap(score=sum(hit for _, _, hit in found) / len(found) if found else 0.0, anchors=anchors)


@lru_cache(maxsize=CACHED_SOLUTIONS)
def _extract(extractor: AnchorExtractor, problem: str, solution: str) -> tuple[Any, ...]:
    return extractor.extract(problem, solution)


def _find_in_chunk(extractor: AnchorExtractor, pairs: Sequence[Pair]) -> list[list[Found]]:
    return [_find(extractor, pair) for pair in pairs]


def _size(pair: Pair) -> int:
    return sum(map(len, pair))


def _chunks(pairs: Sequence[Pair], count: int) -> list[list[Pair]]:
    """The pairs in order, cut into at most `count` runs of about the same number of characters."""
    target = sum(map(_size, pairs)) / count
    chunks: list[list[Pair]] = [[]]
    filled = 0
    for pair in pairs:
        if chunks[-1] and filled >= target:
            chunks.append([])
            filled = 0
        chunks[-1].append(pair)
        filled += _size(pair)
    return chunks
