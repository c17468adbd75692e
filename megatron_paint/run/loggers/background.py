"""Calls a logger from a thread, so that no step waits for a network."""

import threading
from collections import deque
from collections.abc import Callable

from megatron_paint.base.errors import UserError
from megatron_paint.run.loggers.interface import Logger, Outcome

OPEN_SECONDS = 15.0  # most that the start of a run waits for the connections of all loggers
CLOSE_SECONDS = 60.0  # most that its end waits for what is not sent yet by any of them
PAUSE_SECONDS = 30.0  # between two attempts to send the same values
MOST_WAITING = 1000  # calls that wait for the network; more of them end the logger


class BackgroundLogger:
    """A logger whose calls are made one after another by a thread.

    `failure` is the error that ended it, and `notices` what happened besides; the owner prints both. A call that fails
    with a temporary error is repeated, and the calls after it wait.
    """

    def __init__(self, logger: Logger, *, pause: float = PAUSE_SECONDS) -> None:
        self.logger, self._pause = logger, pause
        self.failure: Exception | None = None
        self.notices: deque[str] = deque()
        self._calls: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._is_open = threading.Event()
        self._ends = False
        self._thread = threading.Thread(target=self._work, name=f"logger {logger.name}", daemon=True)

    def open(self) -> None:
        """Starts the thread, which connects. It returns at once."""
        self._thread.start()

    def wait_open(self, seconds: float) -> None:
        """Waits for the connection or an error, but no longer than so many seconds."""
        self._is_open.wait(seconds)

    def call(self, act: Callable[[], None]) -> None:
        """Adds a call. It returns at once."""
        with self._changed:
            if len(self._calls) >= MOST_WAITING:
                self.failure = self.failure or TimeoutError(f"{MOST_WAITING} records wait for an answer")
                self._calls.clear()
            if self.failure is None:
                self._calls.append(act)
            self._changed.notify()

    def close(self, outcome: Outcome) -> None:
        """Adds the last call. It returns at once."""
        self.call(lambda: self.logger.close(outcome))
        with self._changed:
            self._ends = True
            self._changed.notify()

    def wait_closed(self, seconds: float) -> None:
        """Waits until everything is sent, but no longer than so many seconds."""
        self._thread.join(seconds)
        if self._thread.is_alive() and self.failure is None:
            self.failure = TimeoutError(f"not everything was sent within {CLOSE_SECONDS:g} seconds")

    def _work(self) -> None:
        try:
            self._repeat(self._open)
            self._is_open.set()
            while (act := self._next()) is not None:
                self._repeat(act)
        except Exception as error:
            self.failure = self.failure or error
        finally:
            self._is_open.set()

    def _open(self) -> None:
        if line := self.logger.open():
            self.notices.append(line)

    def _next(self) -> Callable[[], None] | None:
        """The next call; None at the end, or after a failure."""
        with self._changed:
            self._changed.wait_for(lambda: self._calls or self._ends or self.failure is not None)
            return self._calls.popleft() if self._calls and self.failure is None else None

    def _repeat(self, act: Callable[[], None]) -> None:
        """Repeats the call until it succeeds or fails with an error that is not temporary; at the end, with any."""
        attempt = 0
        while self.failure is None:
            try:
                act()
            except Exception as error:
                if self._ends or isinstance(error, UserError) or not self.logger.is_temporary(error):
                    raise
                if attempt == 0:
                    self.notices.append(f"{error}; its values wait, and are sent later")
            else:
                if attempt:
                    self.notices.append("the connection works again")
                return
            attempt += 1
            with self._changed:
                self._changed.wait_for(lambda: self._ends or self.failure is not None, timeout=self._pause)
