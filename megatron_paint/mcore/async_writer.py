"""One write that goes on behind the training, in a thread of each rank."""

import dataclasses
import threading
from collections.abc import Callable

from megatron_paint.base.errors import UserError
from megatron_paint.mcore.collectives import all_ranks_do
from megatron_paint.mcore.ranks import Ranks


class Writer:
    """Runs a function on all ranks together, whose threads talk over a process group of their own."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._behind = dataclasses.replace(ranks, host_group=ranks.writer_group)
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def start(self, write: Callable[[Ranks], None]) -> None:
        """Begins; all ranks call together. RuntimeError: `finish` has not said yet that the write before is done."""
        if self._thread is not None:
            raise RuntimeError("a write goes on already: finish it first")
        self._error = None
        # A daemon: a run that ends by an error does not wait for it, and an unfinished write counts as none.
        self._thread = threading.Thread(target=self._run, args=[write], name="writer", daemon=True)
        self._thread.start()

    def finish(self, *, wait: bool) -> bool:
        """Whether a write has ended since the last call, on all ranks, which call together; `wait` until it has.

        To wait takes no message between ranks but the threads' own. UserError: the write's, on all ranks. Any other
        error of it is raised on the rank that met it.
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
            write(self._behind)
        except Exception as error:
            self._error = error
