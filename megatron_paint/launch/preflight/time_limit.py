"""When each phase must be over, and the end of a process that does not come back from one."""

import os
import sys
import threading
import time

from megatron_paint.launch.preflight.timed_process import end_all

BAD = 3  # exit status: a check failed
IMPORT_SECONDS = 300.0
# Shares of the limit, counted from the start, at which a phase is over at the latest.
JOIN, LOCAL, COLLECTIVE, FAREWELL = 0.4, 0.69, 0.88, 0.98
GRACE = 0.06  # of the limit, for what was found in time to arrive, also from a node that is held up for a moment


class TimeLimit:
    """The time of this process, which ends with it; `phase` says what it does, for a message at the end of the time."""

    def __init__(self, seconds: float, node: str, phase: str) -> None:
        self.seconds = seconds
        self.began = time.monotonic()
        self.node = node
        self.phase = phase
        self._begun = threading.Event()

    def begin(self, seconds: float) -> None:
        """Begins anew."""
        self.began = time.monotonic()
        self.seconds = seconds
        self._begun.set()

    def at(self, share: float) -> float:
        """The moment (time.monotonic) at which this share of the time is over."""
        return self.began + share * self.seconds

    def left(self, share: float) -> float:
        """Seconds until then."""
        return max(0.0, self.at(share) - time.monotonic())

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.began

    def enforce(self) -> None:
        """Lets a thread end the process when the time is up: a store whose host hangs never comes back."""
        threading.Thread(target=self._end, daemon=True).start()

    def _end(self) -> None:
        while (left := self.left(1.0)) > 0:
            self._begun.wait(left)
            self._begun.clear()
        print(f"preflight: node {self.node}: time is up after {self.seconds:g} s, in {self.phase}", file=sys.stderr)
        sys.stderr.flush()
        end_all()
        os._exit(BAD)
