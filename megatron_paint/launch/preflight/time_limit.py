"""The deadline of each phase, and the end of a process that does not return from one."""

import os
import sys
import threading
import time

from megatron_paint.launch.preflight.timed_process import end_all

BAD = 3  # exit status: a check failed
IMPORT_SECONDS = 300.0
# Deadlines of the phases as shares of the limit, counted from the start.
JOIN, LOCAL, COLLECTIVE, GOODBYE = 0.4, 0.69, 0.88, 0.98
# Share of the limit in which results that were ready in time may still arrive, also from a node with a short delay.
GRACE = 0.06


class TimeLimit:
    """The time that this process has. `phase` is what it does now, for the message at the end of the time."""

    def __init__(self, seconds: float, node: str, phase: str) -> None:
        self.seconds = seconds
        self.began = time.monotonic()
        self.node = node
        self.phase = phase
        self._restarted = threading.Event()

    def restart(self, seconds: float) -> None:
        """Starts the time again, with this limit."""
        self.began = time.monotonic()
        self.seconds = seconds
        self._restarted.set()

    def at(self, share: float) -> float:
        """The moment (time.monotonic) at which this share of the time is over."""
        return self.began + share * self.seconds

    def left(self, share: float) -> float:
        """Seconds until this share of the time is over."""
        return max(0.0, self.at(share) - time.monotonic())

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.began

    def enforce(self) -> None:
        """Starts a thread that ends the process when the time is up.

        It is needed because a call to a store never returns if the store's host hangs.
        """
        threading.Thread(target=self._end, daemon=True).start()

    def _end(self) -> None:
        while (left := self.left(1.0)) > 0:
            self._restarted.wait(left)
            self._restarted.clear()
        print(f"preflight: node {self.node}: time is up after {self.seconds:g} s, in {self.phase}", file=sys.stderr)
        sys.stderr.flush()
        end_all()
        os._exit(BAD)
