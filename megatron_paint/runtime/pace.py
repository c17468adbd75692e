"""How long the parts of a run took last time. From this a run estimates whether the next part fits into its time."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager


class Pace:
    """Seconds by part: parts that the run waits for (`timed`), and parts in the background (`begin`, `end`)."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._took: dict[str, float] = {}
        self._begun: dict[str, float] = {}
        self.total: dict[str, float] = {}  # of the parts that the run waited for, all together

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Measures the `with` block."""
        begun = self._clock()
        yield
        self._took[part] = self._clock() - begun
        self.total[part] = self.total.get(part, 0.0) + self._took[part]

    def begin(self, part: str) -> None:
        """Records the start of a part in the background."""
        self._begun[part] = self._clock()

    def end(self, part: str) -> None:
        """Records its end."""
        self._took[part] = self._clock() - self._begun.pop(part)

    def expected(self, parts: Iterable[str]) -> float:
        """Seconds that these parts will take, plus the rest of the parts in the background. A new part counts 0."""
        waited = sum(self._took.get(part, 0.0) for part in parts)
        now = self._clock()
        return waited + sum(max(0.0, self._took.get(part, 0.0) - (now - at)) for part, at in self._begun.items())
