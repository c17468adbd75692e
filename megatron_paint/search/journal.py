"""The journal of a study: Optuna's file, and the lock under which the workers of a study take turns.

Optuna's own locks for this file do not know whether their owner lives. A worker that is suspended for 30 seconds loses
them without notice, and the lock file of a dead one blocks all others for as long. Its reader refuses the complete file
other lines follow one that was cut short. So the lock here is the one of run folders, which knows dead owners. Whoever
takes it first removes a line that a crash or a full disk has cut short.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_paint.base.errors import UserError
from megatron_paint.run.lock import RunLock
from megatron_paint.run.lock_owner import Owner, process_state
from megatron_paint.run.lock_watch import TIMING, InUse, Timing, heartbeat, read_lock, server_time
from megatron_paint.runtime.files import disk_errors

JOURNAL = "journal.log"
TAIL = 1 << 16  # bytes that are searched at once for the end of the last complete line
WAIT_SECONDS = 0.02  # between two tries to take the lock
SAY_SECONDS = 60.0  # of waiting, after which the holder is named

_held: set[str] = set()  # tokens of the locks that this process holds


class StudyLock:
    """The lock of a study's folder. It is taken for moments only, and can be taken again by its holder.

    It has the methods of Optuna's `BaseJournalFileLock`, so Optuna holds it while it writes. `held` makes several
    operations one.
    """

    def __init__(
        self,
        folder: Path,
        *,
        timing: Timing = TIMING,
        say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
    ) -> None:
        """say: gets a line that names the holder if it keeps the lock for long."""
        self.folder, self.journal, self._timing, self._say = folder, folder / JOURNAL, timing, say
        self._depth = 0
        self._lock: RunLock | None = None

    def acquire(self) -> bool:
        """Waits for the lock and repairs the journal. UserError: the disk refuses, or the lock was lost meanwhile."""
        if self._depth:
            self._lock.confirm()
        else:
            self._lock = self._taken()
            _held.add(self._lock.owner.token)
            try:
                repair(self.journal)
            except BaseException:  # the disk may work again at the next try
                self._let_go()
                raise
        self._depth += 1
        return True

    def release(self) -> None:
        """Releases the lock if this is the outermost `acquire`."""
        self._depth -= 1
        if not self._depth:
            self._let_go()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Holds the lock for a block."""
        self.acquire()
        try:
            yield
        finally:
            self.release()

    def _let_go(self) -> None:
        lock, self._lock = self._lock, None
        _held.discard(lock.owner.token)
        lock.release()

    def _taken(self) -> RunLock:
        owner: Owner | None = None
        say_at = time.monotonic() + SAY_SECONDS
        while True:
            lock = RunLock(self.folder, timing=self._timing, owner=owner)
            try:
                lock.take()
                return lock
            except InUse:
                time.sleep(WAIT_SECONDS)
            holder = read_lock(lock.path)
            owner = holder if holder is not None and _is_left_over(holder) else None
            if holder is not None and time.monotonic() > say_at:
                say_at = float("inf")
                self._say(f"megatron-paint: waiting for the lock of {self.folder}: {holder} holds it, and is alive")


def _is_left_over(holder: Owner) -> bool:
    """Whether this process has the lock without holding it: a full disk has refused the release."""
    return holder.pid == os.getpid() and holder.token not in _held and process_state(holder) == "lives"


def repair(journal: Path) -> bool:
    """Removes an incomplete last line from a journal; returns whether there was one. Call it under the lock.

    The process that wrote it died or saw an error, so it has not counted the line as written, and no reader uses a line
    without its end.
    """
    with disk_errors(journal):
        try:
            descriptor = os.open(journal, os.O_RDWR)
        except FileNotFoundError:
            return False
        try:
            size = os.fstat(descriptor).st_size
            end = size
            while end > 0:
                start = max(0, end - TAIL)
                newline = os.pread(descriptor, end - start, start).rfind(b"\n")
                if newline >= 0:
                    end = start + newline + 1
                    break
                end = start
            if end == size:
                return False
            os.ftruncate(descriptor, end)
            os.fsync(descriptor)
            return True
        finally:
            os.close(descriptor)


def check_journal(journal: Path) -> None:
    """UserError names the first line that Optuna could not read. No journal is a good one."""
    with disk_errors(journal):
        lines = journal.read_bytes().splitlines() if journal.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            is_entry = isinstance(json.loads(line)["op_code"], int)
        except (ValueError, KeyError, TypeError, RecursionError):
            is_entry = False
        if not is_entry:
            raise UserError(
                f"{journal}:{number}: the line is damaged, so the study cannot be read. Nothing was changed: restore "
                "the file from a copy, or give another --out"
            )


class Claim:
    """The right of one worker to run one trial, from `take` to `release`: a lock that names its owner."""

    def __init__(self, folder: Path, *, timing: Timing = TIMING) -> None:
        self._lock = RunLock(folder, timing=timing)

    def seems_taken(self) -> bool:
        """Whether a worker that lives, or one on another machine with a recent heartbeat, has the claim."""
        path = self._lock.path
        if (held := read_lock(path)) is None or (state := process_state(held)) == "gone":
            return False
        if state == "lives":
            return True
        beat = heartbeat(path, held)
        return beat is not None and server_time(self._lock.folder) - beat < self._lock.timing.limit

    def take(self) -> bool:
        """Takes the claim; False if another worker that lives has it. UserError: the disk refuses."""
        try:
            self._lock.take()
        except InUse:
            return False
        return True

    def confirm(self) -> None:
        """UserError: another worker has taken the trial over."""
        try:
            self._lock.confirm()
        except UserError as error:
            raise UserError(f"{error}: this worker was suspended, and leaves the study to the others") from None

    def release(self) -> None:
        """Gives the trial back."""
        self._lock.release()
