"""How far the long work of this process is: done and total, for a display that another thread draws.

Counting adds one number and takes no lock. No rank asks another one: a display shows its own rank's part.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Work:
    """Work of a known size. Its thread counts, and any thread may read.

    total: in units of `unit`; 0: not known. at_most: whether the work may end before its total. in_background: whether
    other work runs meanwhile.
    """

    def __init__(
        self,
        name: str,
        *,
        total: int,
        unit: str,
        at_most: bool = False,
        in_background: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name, self.total, self.unit = name, total, unit
        self.at_most, self.in_background = at_most, in_background
        self.done = 0
        self._clock = clock
        self._begun = clock()

    def advance(self, count: int = 1) -> None:
        """Counts units that are done."""
        self.done += count

    @property
    def seconds(self) -> float:
        """Seconds since the beginning."""
        return self._clock() - self._begun

    @property
    def rate(self) -> float:
        """Units a second since the beginning; 0 before the first one."""
        seconds = self.seconds
        return self.done / seconds if seconds > 0 else 0.0

    @property
    def seconds_left(self) -> float | None:
        """Seconds that the rest takes at this rate; None: not known."""
        return max(0, self.total - self.done) / self.rate if self.total and self.rate else None


_open: list[Work] = []  # the innermost is the last one


@contextmanager
def work(name: str, *, total: int, unit: str, at_most: bool = False, in_background: bool = False) -> Iterator[Work]:
    """Work that displays show until the block ends."""
    begun = Work(name, total=total, unit=unit, at_most=at_most, in_background=in_background)
    _open.append(begun)
    try:
        yield begun
    finally:
        _open.remove(begun)


def work_now() -> Work | None:
    """The work that this process began last and has not ended, if possible not one in the background; None: no work."""
    found = list(_open)
    return next((one for one in reversed(found) if not one.in_background), found[-1] if found else None)
