"""One write in the background of the training, in a thread of each rank."""

import dataclasses
import threading
from collections.abc import Callable

from megatron_paint.base.errors import UserError
from megatron_paint.mcore.collectives import all_ranks_do
from megatron_paint.mcore.ranks import Ranks


class Writer:
    """Runs a function on all ranks together. Its threads communicate over a separate process group."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._background = dataclasses.replace(ranks, host_group=ranks.writer_group)
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def start(self, write: Callable[[Ranks], None]) -> None:
        """Starts a write; all ranks call together. RuntimeError: the last one is not finished."""
        if self._thread is not None:
            raise RuntimeError("a write is still running: finish it first")
        self._error = None
        # A daemon: a run that ends with an error does not wait for it. An unfinished write counts as no write.
        self._thread = threading.Thread(target=self._run, args=[write], name="writer", daemon=True)
        self._thread.start()

    def finish(self, *, wait: bool) -> bool:
        """Whether a write has ended on all ranks since the last call; all ranks call together.

        With `wait`, blocks until it has ended; this needs no message between ranks except those of the threads.
        UserError: the write failed with a UserError; all ranks raise it. Any other error is raised only on the rank
        where it happened.
        """
        if self._thread is None:
            return False
        if wait:
            self._thread.join()
        ended = not self._thread.is_alive()
        if ended and self._error is not None and not isinstance(self._error, UserError):
            raise self._error
        if not wait and not all(all_ranks_do(self.ranks, lambda: ended)):
            return False
        self._thread = None
        if self._error is not None:
            raise self._error
        return True

    def _run(self, write: Callable[[Ranks], None]) -> None:
        try:
            write(self._background)
        except Exception as error:
            self._error = error
