"""The lock of a run folder: one run at a time trains in it.

RUN/lock.json names the owner: host, process id, start of the process, Slurm job. Its modification time is the owner's
heartbeat. The launcher owns the run of its ranks; under torchrun or srun rank 0 does.

Why it is atomic, over NFS too:

* A lock is created by link(2) of a complete file. The server does that completely or not at all, and exactly one of
  several processes succeeds. If the server's answer is lost, the client's second try reports that the file exists. The
  token in the file then tells whose it is.
* The lock of a dead owner is replaced by rename(2) of the file `.lock.json.TOKEN.next`, where TOKEN is the dead one's.
  That file is a lock too: it names the process that has created it, and becomes the lock of that process.
* It is taken over in the same way from a process that died with it. If that process was only suspended, it later finds
  no file to rename, or renames the other process's. The token in the lock then tells whose the lock is.
* One gap of milliseconds remains: a process is suspended between reading the lock and the rename for longer than
  `timing.look`, its file is taken over and used, and a third process creates its own file just before the first wakes.
  The first then puts the third one's file over the lock of the second. The second finds that before it next writes
  (`confirm`), and ends.
"""

import errno
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from megatron_paint.base.errors import UserError, about
from megatron_paint.run.lock_owner import Owner, process_state, this_process, to_text
from megatron_paint.run.lock_watch import (
    LOCK,
    TIMING,
    InUse,
    Timing,
    in_use,
    owner_of,
    owner_state,
    read_lock,
    server_time,
    stays,
    watch,
)
from megatron_paint.runtime.files import disk_errors
from megatron_paint.runtime.new_folders import make_folders, remove_empty

NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


class RunLock:
    """The lock of one run folder, from `take` to `release`."""

    def __init__(self, folder: Path, *, timing: Timing = TIMING, owner: Owner | None = None) -> None:
        self.folder, self.path, self.timing = folder, folder / LOCK, timing
        self.owner = owner or this_process()
        self.is_lost = False
        self._made: list[Path] = []  # folders that `take` has created
        self._renewed = _clock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    # The life of a lock

    def take(
        self, *, on_lost: Callable[[str], None] | None = None, on_wait: Callable[[str], None] = lambda line: None
    ) -> str:
        """Takes the lock and renews it from then on. Returns a line about the owner it was taken from, "" for none.

        It waits until it is known whether another owner lives: at most `timing.limit` seconds. If Slurm is ending the
        owner's job, it first waits for that: at most `timing.completing` seconds. on_lost: called by a thread with a
        message if another process takes the lock over. on_wait: gets a line before it waits. UserError: the owner
        lives; the disk refuses.
        """
        try:
            with about("run.dir"), disk_errors(self.folder):
                held, reason = self._take(on_wait)
                self._remove_rest()
            self._start(on_lost)
            if reason == "superseded":
                time.sleep(self.timing.look)  # until the other process has noticed: it looks at every heartbeat
                self.confirm()
        except BaseException:
            self.release()
            raise
        return "" if held is None else f"took over the lock of {self.folder} from {held}: {REASONS[reason]}"

    def join(self, *, on_lost: Callable[[str], None] | None = None) -> None:
        """Renews the lock that the launcher of this process has taken. UserError: the launcher has lost it."""
        self.confirm()
        self._start(on_lost)

    def confirm(self) -> None:
        """Raises UserError if another process has taken the lock over. Call it before anything is written."""
        with about("run.dir"), disk_errors(self.path):
            if not self.renew():
                raise UserError(self._lost_message())

    def renew(self) -> bool:
        """Writes a heartbeat. Returns False if the lock is another process's now."""
        if self.is_lost:
            return False
        now = _clock()
        try:
            descriptor = os.open(self.path, os.O_RDWR)
        except FileNotFoundError:
            # Nobody takes over a lock with a heartbeat as new as that: a user has removed the file.
            self.is_lost = now - self._renewed > self.timing.look or not self._create(self.path)
        else:
            try:
                self.is_lost = owner_of(descriptor).token != self.owner.token
                if not self.is_lost:
                    os.utime(descriptor)  # the server's time
            finally:
                os.close(descriptor)
        self._renewed = now
        return not self.is_lost

    def release(self) -> None:
        """Removes the lock, unless another process has taken it over, and the folder if the run left nothing in it."""
        self.stop()
        successor = self._successor(self.owner)
        # With another token: if this process dies here, who takes the lock over must not find the dead owner twice.
        release = replace(self.owner, token=uuid.uuid4().hex)
        with suppress(OSError):
            if self._create(successor, release):  # else another process is about to replace it
                try:
                    if (now := read_lock(self.path)) is not None and now.token == self.owner.token:
                        self.path.unlink()
                finally:
                    successor.unlink()
        remove_empty(self._made)

    def stop(self) -> None:
        """Stops renewing."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def _start(self, on_lost: Callable[[str], None] | None) -> None:
        self._thread = threading.Thread(target=self._renew_always, args=(on_lost,), name="run lock", daemon=True)
        self._thread.start()

    def _renew_always(self, on_lost: Callable[[str], None] | None) -> None:
        while not self._ended.wait(self.timing.renew):
            # A disk that refuses does not end the run here. When it comes back, this process sees what happened.
            with suppress(OSError):
                if not self.renew():
                    if on_lost is not None:
                        on_lost(self._lost_message())
                    return

    def _lost_message(self) -> str:
        with suppress(OSError):
            if (now := read_lock(self.path)) is not None:
                return (
                    f"run.dir={self.folder} was taken over by {now}: this process was silent for more than "
                    f"{self.timing.limit:g} s, or Slurm has restarted its job. Nothing more is written here"
                )
        return f"run.dir={self.folder}: the lock {self.path} was taken over. Nothing more is written here"

    # Taking

    def _take(self, on_wait: Callable[[str], None]) -> tuple[Owner | None, str]:
        while True:
            if not self.folder.is_dir():  # another start that fails may remove it again
                self._made = [*make_folders(self.folder), *self._made]
            try:
                if self._create(self.path):
                    return None, ""
            except FileNotFoundError:
                continue
            if (held := read_lock(self.path)) is None:
                continue
            reason = self._why_dead(held, on_wait)
            if reason and self._replace(self.path, held):
                return held, reason

    def _why_dead(self, held: Owner, on_wait: Callable[[str], None]) -> str:
        """Why the lock may be taken from its owner; "" if it changed meanwhile. UserError: the owner lives."""
        state, job = owner_state(self.path, held, timing=self.timing, on_wait=on_wait)
        if state == "lives":
            raise InUse(in_use(self.folder, held, job=job))
        if state != "unknown":
            return state
        has_ended = job == "ended"
        seconds = self.timing.look if has_ended else self.timing.limit
        on_wait(f"{self.folder} is locked by {held}: watching its heartbeat, for {seconds:g} s at most")
        found = watch(self.path, held, timing=self.timing, has_ended=has_ended)
        if found == "lives" and not has_ended:
            raise InUse(in_use(self.folder, held, job=job))
        return "superseded" if found == "lives" else found

    def _replace(self, path: Path, held: Owner) -> bool:
        """Replaces the lock of a dead owner by this one; False: another process has done so, or does it now."""
        successor = self._successor(held)
        if not self._hold(successor):
            return False
        try:
            now = read_lock(path)
            if now is not None and now.token == held.token:
                with suppress(FileNotFoundError):  # while this process was suspended, another one has renamed it
                    os.replace(successor, path)
                now = read_lock(path)
            return now is not None and now.token == self.owner.token
        finally:
            with suppress(FileNotFoundError):
                successor.unlink()

    def _hold(self, successor: Path) -> bool:
        """Creates the file of the process that replaces a lock, or takes it from a process that died with it."""
        if self._create(successor):
            return True
        if (holder := read_lock(successor)) is None:
            return False
        state = process_state(holder)
        if state == "unknown":  # it lives for milliseconds: whoever has it for longer is dead
            state = "gone" if stays(successor, holder, self.timing.look) else "lives"
        if state == "lives":
            time.sleep(0.01)
            return False
        if self._successor(holder) == successor:  # of an earlier version, which died in `release`
            with suppress(FileNotFoundError):
                os.rename(successor, successor.with_name(f"{successor.name}.{self.owner.token}"))
            return False
        return self._replace(successor, holder)

    def _create(self, path: Path, owner: Owner | None = None) -> bool:
        """Creates a file with an owner, by default this one; False if it exists and is another one's."""
        owner = owner or self.owner
        while True:
            new = self._written(owner)
            try:
                os.link(new, path)
                return True
            except FileExistsError:
                held = read_lock(path)
                if held is not None:
                    return held.token == owner.token  # the answer to an earlier try may have been lost
            except OSError as error:
                if error.errno not in NO_LINKS:
                    raise
                return self._create_without_links(path, owner)
            finally:
                with suppress(FileNotFoundError):
                    new.unlink()

    def _create_without_links(self, path: Path, owner: Owner) -> bool:
        """The same on a file system without hard links. A crash may leave the file without a name in it."""
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            held = read_lock(path)
            return held is not None and held.token == owner.token
        with open(descriptor, "w", encoding="utf-8") as stream:
            stream.write(to_text(owner))
        return True

    def _written(self, owner: Owner) -> Path:
        """A new file with an owner, complete on the server."""
        new = self.path.with_name(f".{LOCK}.{self.owner.token}.{threading.get_ident()}.new")
        try:
            with open(new, "w", encoding="utf-8") as stream:
                stream.write(to_text(owner))
                stream.flush()
                os.fsync(stream.fileno())
        except OSError:  # a full disk
            with suppress(OSError):
                new.unlink()
            raise
        return new

    def _successor(self, held: Owner) -> Path:
        return self.path.with_name(f".{LOCK}.{held.token}.next")

    def _remove_rest(self) -> None:
        """Removes what dead processes have left. A living process has such a file for milliseconds."""
        now = server_time(self.folder)
        for file in self.folder.glob(f".{LOCK}.*"):
            with suppress(OSError):
                if now - file.stat().st_mtime > self.timing.limit:
                    file.unlink()


REASONS = {
    "gone": "its process is gone",
    "ended": "Slurm has ended its job, and its heartbeat has stopped",
    "silent": "its heartbeat has stopped",
    "superseded": "Slurm has ended its job, and the process that still runs will end",
}


@contextmanager
def locked(
    folder: Path,
    *,
    say: Callable[[str], None],
    on_lost: Callable[[str], None] | None,
    on_wait: Callable[[str], None] = lambda line: None,
) -> Iterator[RunLock]:
    """Holds the lock of a run folder. say: gets the line about a dead owner. on_lost, on_wait: see `RunLock.take`."""
    lock = RunLock(folder)
    taken_over = lock.take(on_lost=on_lost, on_wait=on_wait)
    try:
        if taken_over:
            say(taken_over)
        yield lock
    finally:
        lock.release()


def _clock() -> float:
    """Seconds that also pass while the machine sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
