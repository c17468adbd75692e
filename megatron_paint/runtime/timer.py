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
        """Adds the time inside to the phase."""
        started = self._clock()
        try:
            yield
        finally:
            self.add(phase, self._clock() - started)

    def add(self, phase: str, seconds: float) -> None:
        """Adds time that was measured elsewhere to the phase."""
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds
