"""Wall time of the phases of a step."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Timer:
    """Adds up seconds by phase: `with timer("mask"): ...`."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: dict[str, float] = {}
        self._clock = clock

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Adds the time inside to the phase; not if it ends by an exception."""
        started = self._clock()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + self._clock() - started
