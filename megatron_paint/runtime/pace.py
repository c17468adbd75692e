"""How long the parts of a run took the last time, by which it judges whether there is time for the next."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager


class Pace:
    """Seconds of parts by name: of those that are waited for (`timed`), and of those that go on (`begin`, `end`)."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._took: dict[str, float] = {}
        self._begun: dict[str, float] = {}

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Measures what happens inside."""
        begun = self._clock()
        yield
        self._took[part] = self._clock() - begun

    def begin(self, part: str) -> None:
        """Notes that a part begins that goes on behind others."""
        self._begun[part] = self._clock()

    def end(self, part: str) -> None:
        """Notes that it has ended."""
        self._took[part] = self._clock() - self._begun.pop(part)

    def expected(self, parts: Iterable[str]) -> float:
        """Seconds that these will take together, and what goes on may take yet; a part that is new counts 0."""
        waited = sum(self._took.get(part, 0.0) for part in parts)
        now = self._clock()
        return waited + sum(max(0.0, self._took.get(part, 0.0) - (now - at)) for part, at in self._begun.items())
