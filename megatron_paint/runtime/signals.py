"""Records signals and does not act on them, so that a process can end at a good moment."""

import signal
from collections.abc import Callable, Sequence
from types import FrameType


class RecordedSignals:
    """Records these signals between `__enter__` and `__exit__`: `count` signals, of which `signal` is the first."""

    def __init__(self, numbers: Sequence[signal.Signals], *, also_ignored: bool = False) -> None:
        """also_ignored: record them even if this process was started with these signals ignored."""
        self.signal: signal.Signals | None = None
        self.count = 0
        self._numbers, self._also_ignored = numbers, also_ignored
        self._before: dict[signal.Signals, Callable | int | None] = {}

    def __enter__(self) -> "RecordedSignals":
        for number in self._numbers:
            if self._also_ignored or signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._record)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _record(self, number: int, _: FrameType | None) -> None:
        self.signal = self.signal or signal.Signals(number)
        self.count += 1
