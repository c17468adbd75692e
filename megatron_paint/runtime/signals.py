"""Signals that are noted instead of acted on, by a process that ends in its own time."""

import signal
from collections.abc import Callable, Sequence
from types import FrameType


class NotedSignals:
    """Notes these signals between `__enter__` and `__exit__`; `signal` is the first of `count`, None until then."""

    def __init__(self, numbers: Sequence[signal.Signals], *, also_ignored: bool = False) -> None:
        """also_ignored: note them even where this process was started to ignore them."""
        self.signal: signal.Signals | None = None
        self.count = 0
        self._numbers, self._also_ignored = numbers, also_ignored
        self._before: dict[signal.Signals, Callable | int | None] = {}

    def __enter__(self) -> "NotedSignals":
        for number in self._numbers:
            if self._also_ignored or signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.signal = self.signal or signal.Signals(number)
        self.count += 1
