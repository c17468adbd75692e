"""Reads the lock of a run folder, and watches whether its owner lives.

The modification time of the file is the owner's heartbeat. The file server sets every time that is compared here, so
the clocks of hosts may differ.
"""

import os
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megatron_paint.base.errors import UserError, about
from megatron_paint.run.lock_owner import Owner, from_text, job_has_ended, process_state
from megatron_paint.runtime.files import disk_errors

LOCK = "lock.json"


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds; all are ours."""

    renew: float = 10.0  # between heartbeats of an owner
    look: float = 25.0  # two and a half heartbeats: in these a living owner is seen to live
    limit: float = 120.0  # an owner on another host without a heartbeat for so long is dead


TIMING = Timing()


def read_lock(path: Path) -> Owner | None:
    """The owner in a lock file; None if there is no file."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        return owner_of(descriptor)
    finally:
        os.close(descriptor)


def owner_of(descriptor: int) -> Owner:
    """The owner in an open lock file."""
    content = os.read(descriptor, 1 << 16).decode("utf-8", "replace")
    return from_text(content, unreadable=f"unreadable{os.fstat(descriptor).st_ino}")


def watch(path: Path, held: Owner, *, timing: Timing, has_ended: bool) -> str:
    """Watches the heartbeat of an owner on another machine: lives, silent or ended; "" if the lock is not its any more.

    has_ended: Slurm has ended its job. Then no heartbeat within `look` is enough. Otherwise the heartbeat must be older
    than `limit`. A server that was not reachable for longer does not make an owner dead: it is watched for `look` then.
    """
    first = heartbeat(path, held)
    if first is None:
        return ""
    age = server_time(path.parent) - first
    if has_ended and age > timing.look:
        return "ended"
    end = time.monotonic() + (timing.look if has_ended else max(timing.look, min(timing.limit, timing.limit - age)))
    while time.monotonic() < end:
        time.sleep(min(1.0, timing.renew / 4))
        now = heartbeat(path, held)
        if now is None:
            return ""
        if now != first:
            return "lives"
    return "ended" if has_ended else "silent"


def stays(path: Path, held: Owner, seconds: float) -> bool:
    """Whether a file is there, and the same owner's, for so long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if heartbeat(path, held) is None:
            return False
        time.sleep(min(0.1, seconds / 10))
    return True


def heartbeat(path: Path, held: Owner) -> float | None:
    """The time of the last heartbeat; None if the lock is gone or another owner's. Opening asks an NFS server anew."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        return os.fstat(descriptor).st_mtime if owner_of(descriptor).token == held.token else None
    finally:
        os.close(descriptor)


def server_time(folder: Path) -> float:
    """The file server's clock, as it dates a new file."""
    new = folder / f".{LOCK}.{os.getpid()}.{threading.get_ident()}.time"
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        os.utime(descriptor)
        return os.fstat(descriptor).st_mtime
    finally:
        os.close(descriptor)
        with suppress(FileNotFoundError):
            new.unlink()


def in_use(folder: Path, held: Owner) -> str:
    """The message about an owner that lives."""
    end = f"scancel {held.job}" if held.job else f"kill {held.pid} on {held.host}"
    return (
        f"{folder} is in use: {held} owns it since {held.since}, and lives. Wait for its end, end it ({end}), or give "
        f"another run.dir. Its lock is {folder / LOCK}"
    )


def refuse_if_in_use(folder: Path, *, timing: Timing = TIMING, watches: bool = True) -> None:
    """Raises UserError if another process owns the run. Changes nothing.

    watches: also look whether an owner on another machine lives, for one and a half of its heartbeats.
    """
    path = folder / LOCK
    with about("run.dir"), disk_errors(folder), suppress(NotADirectoryError):
        if (held := read_lock(path)) is None or job_has_ended(held):
            return
        state = process_state(held)
        if state == "lives" or (state == "unknown" and watches and _beats(path, held, timing)):
            raise UserError(in_use(folder, held))


def _beats(path: Path, held: Owner, timing: Timing) -> bool:
    """Whether there is a heartbeat of this owner within one and a half times the usual time."""
    first, end = heartbeat(path, held), time.monotonic() + 1.5 * timing.renew
    while time.monotonic() < end:
        time.sleep(min(1.0, timing.renew / 4))
        if (now := heartbeat(path, held)) != first:
            return now is not None
    return False
