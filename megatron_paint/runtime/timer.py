"""Wall time of the phases of a step."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol


class PhaseObserver(Protocol):
    """What `observe_phases` informs of each phase, in the thread of the phase."""

    def begin(self, phase: str) -> Any:
        """Called before the timer's clock is read. `end` gets what it returns."""

    def end(self, begun: Any, started: float, ended: float | None) -> None:
        """Called after the clock is read again, with both times. ended: None: the phase ended by an exception."""


_observer: PhaseObserver | None = None


def observe_phases(observer: PhaseObserver | None) -> None:
    """From now on, every timer of this process informs the observer; None: no one."""
    global _observer
    _observer = observer


class Timer:
    """Adds up seconds by phase: `with timer("mask"): ...`."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: dict[str, float] = {}
        self._clock = clock

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Adds the time inside to the phase; not if it ends by an exception."""
        observer, ended = _observer, None
        begun = None if observer is None else observer.begin(phase)
        started = self._clock()
        try:
            yield
            ended = self._clock()
            self.seconds[phase] = self.seconds.get(phase, 0.0) + ended - started
        finally:
            if observer is not None:
                observer.end(begun, started, ended)
