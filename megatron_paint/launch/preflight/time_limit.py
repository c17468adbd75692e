"""When each phase must be over, and the end of a process that does not come back from one."""

import os
import sys
import threading
import time

from megatron_paint.launch.preflight.errand import end_all

BAD = 3  # exit status: a check failed
# Shares of the limit, counted from the start, at which a phase is over at the latest.
JOIN, LOCAL, COLLECTIVE = 0.5, 0.75, 0.92
GRACE = 0.02  # of the limit, for what was found in time to arrive


class TimeLimit:
    """The time of this process, from its start; `phase` says what it does, for a message at the end of the time."""

    def __init__(self, seconds: float, node: str) -> None:
        self.seconds = seconds
        self.began = time.monotonic()
        self.node = node
        self.phase = "the start"

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
        time.sleep(self.left(1.0))
        print(f"preflight: node {self.node}: time is up after {self.seconds:g} s, in {self.phase}", file=sys.stderr)
        sys.stderr.flush()
        end_all()
        os._exit(BAD)
