"""The overlap: how much of a verified solution a rollout reproduces. It is computed from text, without a model.

It is the recall of anchors (boxed answers, formulas, key numbers) as in PAINT (arXiv 2604.26573). The rules are ours,
and so are the anchors of other domains than mathematics.
reveal.py decides how much of the solution is shown for a given overlap.
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
from megatron_paint.masker.code_anchors import code_parts, extract_code, find_code
from megatron_paint.masker.cut import Parts, math_parts
from megatron_paint.masker.text_anchors import extract_text, find_text, text_parts
from megatron_paint.records import Anchor, Overlap
from megatron_paint.runtime.processes import start_worker

# A pool is used from this amount of work on (ours): about 0.1 s. benchmarks/masker.py: on two busy cores a step of 0.6
# million characters took equally long with and without two workers. The pool costs this process 1/8 of the work.
POOL_CHARACTERS = 1_000_000
CACHED_SOLUTIONS = 1024

FoundAnchor = tuple[str, str, bool]  # kind, text, found; it is sent between processes faster than an Anchor


@dataclass(frozen=True)
class AnchorExtractor:
    """The anchors of a domain: pure functions at module level, so that worker processes can import them.

    `extract(problem, solution)` returns the anchors, each once, with `.kind` and normalised `.text`.
    `find(anchors, rollout)` tells for each anchor whether the rollout contains it. `parts(solution)` returns the parts
    of a solution that `cut_solution` keeps complete where it can.
    """

    extract: Callable[[str, str], tuple[Any, ...]]
    find: Callable[[tuple[Any, ...], str], tuple[bool, ...]]
    parts: Callable[[str], Parts] = math_parts


EXTRACTORS: dict[str, AnchorExtractor] = {
    "math": AnchorExtractor(extract_math, find_math),
    "code": AnchorExtractor(extract_code, find_code, code_parts),
    "text": AnchorExtractor(extract_text, find_text, text_parts),
}


class Pair(NamedTuple):
    """The texts of one overlap."""

    problem: str
    solution: str
    rollout: str


def register_extractor(name: str, extractor: AnchorExtractor) -> None:
    """Adds a domain. `objective.reveal.anchors` then accepts its name."""
    EXTRACTORS[name] = extractor


def measure_overlap(*, problem: str, solution: str, rollout: str, anchors: str = "math") -> Overlap:
    """Returns the overlap of a rollout with a solution and the anchors behind it.

    The score is the share of the solution's anchors that the rollout contains, in [0, 1]; 0 without anchors. Anchors
    that the problem contains do not count. anchors: name of the extractor. Raises UserError for an unknown name.
    """
    return _measure(extractor_named(anchors), Pair(problem, solution, rollout))


def measure_overlaps(
    pairs: Sequence[Pair], *, anchors: str | Sequence[str] = "math", pool: "MaskerPool | None" = None
) -> list[Overlap]:
    """Returns the overlap of each pair, in order. It uses the worker processes of `pool` if there is enough work.

    anchors: name of the extractor of all pairs, or one name for each pair.
    """
    names = [anchors] * len(pairs) if isinstance(anchors, str) else list(anchors)
    extractors = {name: extractor_named(name) for name in ([anchors] if isinstance(anchors, str) else names)}
    if pool is None or sum(map(_size, pairs)) < pool.from_characters:
        return [_measure(extractors[name], pair) for name, pair in zip(names, pairs, strict=True)]
    found: dict[int, Overlap] = {}
    for name, extractor in extractors.items():
        indices = [index for index, of_pair in enumerate(names) if of_pair == name]
        found |= zip(indices, pool.measure([pairs[index] for index in indices], extractor), strict=True)
    return [found[index] for index in range(len(pairs))]


class MaskerPool:
    """Worker processes for the masker. They start (by spawn) at the first use and run until `close`.

    The results equal those of the serial loop. If a worker dies, the pool warns once and then works without workers.
    from_characters: `measure_overlaps` uses the pool only for at least this many characters of text. Raises UserError
    for fewer than 1 worker.
    """

    def __init__(self, workers: int, *, from_characters: int = POOL_CHARACTERS):
        if workers < 1:
            raise UserError(f"the masker's pool has {workers} workers; it needs at least 1")
        self.workers = workers
        self.from_characters = from_characters
        self._executor: ProcessPoolExecutor | None = None
        self._broken = False

    def measure(self, pairs: Sequence[Pair], extractor: AnchorExtractor) -> list[Overlap]:
        """Returns the overlap of each pair, in order."""
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
                warnings.warn(f"the masker continues in one process: its workers died ({error})", stacklevel=2)
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


def extractor_named(name: str, *, setting: str = "objective.reveal.anchors") -> AnchorExtractor:
    """Returns an extractor. Raises UserError, with the setting that names it and the known ones, if there is none."""
    if name not in EXTRACTORS:
        raise UserError(
            f"{setting}: no anchor extractor has the name {name!r}. The known extractors are "
            f"{', '.join(sorted(EXTRACTORS))} (register_extractor adds one)"
        )
    return EXTRACTORS[name]


def _measure(extractor: AnchorExtractor, pair: Pair) -> Overlap:
    return _overlap(_find(extractor, pair))


def _find(extractor: AnchorExtractor, pair: Pair) -> list[FoundAnchor]:
    anchors = _extract(extractor, pair.problem, pair.solution)
    hits = extractor.find(anchors, pair.rollout)
    return [(anchor.kind, anchor.text, hit) for anchor, hit in zip(anchors, hits, strict=True)]


def _overlap(found: list[FoundAnchor]) -> Overlap:
    anchors = tuple(Anchor(kind=kind, text=text, found=hit) for kind, text, hit in found)
    return Overlap(score=sum(hit for _, _, hit in found) / len(found) if found else 0.0, anchors=anchors)


@lru_cache(maxsize=CACHED_SOLUTIONS)
def _extract(extractor: AnchorExtractor, problem: str, solution: str) -> tuple[Any, ...]:
    return extractor.extract(problem, solution)


def _find_in_chunk(extractor: AnchorExtractor, pairs: Sequence[Pair]) -> list[list[FoundAnchor]]:
    return [_find(extractor, pair) for pair in pairs]


def _size(pair: Pair) -> int:
    return sum(map(len, pair))


def _chunks(pairs: Sequence[Pair], count: int) -> list[list[Pair]]:
    """Cuts the pairs, in order, into at most `count` chunks of about the same number of characters."""
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
