"""Records signals and does not act on them, so that a process can end at a good moment."""

import signal
from collections.abc import Callable, Collection, Sequence
from types import FrameType


class RecordedSignals:
    """Records these signals between `__enter__` and `__exit__`: `count` signals, of which `signal` is the first."""

    def __init__(
        self, numbers: Sequence[signal.Signals], *, also_ignored: Collection[signal.Signals] = frozenset()
    ) -> None:
        """also_ignored: those of them to record even if this process was started so that it ignores them."""
        self.signal: signal.Signals | None = None
        self.count = 0
        self._numbers, self._also_ignored = numbers, also_ignored
        self._before: dict[signal.Signals, Callable | int | None] = {}

    def __enter__(self) -> "RecordedSignals":
        for number in self._numbers:
            if number in self._also_ignored or signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._record)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _record(self, number: int, _: FrameType | None) -> None:
        self.signal = self.signal or signal.Signals(number)
        self.count += 1
