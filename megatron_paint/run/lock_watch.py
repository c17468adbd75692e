"""Reads the lock of a run folder, and watches whether its owner lives.

The modification time of the file is the owner's heartbeat. On NFS and on local disks one clock dates the heartbeats and
the time that they are compared with, so the clocks of hosts may differ. Clients of Lustre and GPFS may date them by
their own clocks. So an owner counts as dead only after it was watched for a while, however old its heartbeat looks.
"""

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_paint.base.errors import UserError, about
from megatron_paint.run.lock_owner import JobState, Owner, from_text, job_state, process_state
from megatron_paint.runtime.files import disk_errors

LOCK = "lock.json"


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds; all are ours."""

    renew: float = 10.0  # between heartbeats of an owner
    look: float = 25.0  # two and a half heartbeats: in these a living owner is seen to live
    limit: float = 120.0  # an owner on another host without a heartbeat for so long is dead
    completing: float = 300.0  # how long a start waits for the end of the owner's job; KillWait is 30 s by default
    poll: float = 5.0  # between two questions to Slurm in this time


TIMING = Timing()


class InUse(UserError):
    """Another process that lives has the lock."""


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
    than `limit`. In both cases the owner is watched for at least `look`: a server that was not reachable for longer,
    or a client with another clock, does not make an owner dead.
    """
    first = heartbeat(path, held)
    if first is None:
        return ""
    age = server_time(path.parent) - first
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
    """The time of the last heartbeat. None: the lock is gone, or another owner has it.

    The file is opened, because an NFS client then asks the server again.
    """
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


def owner_state(
    path: Path, held: Owner, *, timing: Timing, on_wait: Callable[[str], None]
) -> tuple[Literal["gone", "lives", "unknown", ""], JobState]:
    """State of the owner's process, and of its job. "": the lock is not its any more.

    If Slurm is ending its job, this waits for the end first. on_wait: gets a line before that.
    """
    if process_state(held) == "gone":
        return "gone", "unknown"
    job = job_state(held)
    if job == "completing":
        on_wait(
            f"{path.parent} is locked by {held}, which Slurm is ending: waiting for its end, for "
            f"{timing.completing:g} s at most"
        )
        job = _wait_for_end(path, held, timing)
    if heartbeat(path, held) is None:
        return "", job
    return process_state(held), job


def _wait_for_end(path: Path, held: Owner, timing: Timing) -> JobState:
    """Waits while Slurm is ending the owner's job, for `completing` at most. Returns the job's last known state.

    It also ends if the process is gone, has released the lock, or has written no heartbeat for `limit`.
    """
    last, seen = heartbeat(path, held), time.monotonic()
    end = seen + timing.completing
    while (now := time.monotonic()) < end and last is not None and now - seen < timing.limit:
        time.sleep(timing.poll)
        if process_state(held) == "gone":
            break
        if (job := job_state(held)) in ("active", "ended"):  # Slurm may not answer now and then
            return job
        if (beat := heartbeat(path, held)) != last:
            last, seen = beat, time.monotonic()
    return "completing"


def in_use(folder: Path, held: Owner, *, job: JobState = "unknown") -> str:
    """The message about an owner that lives. job: the state of its job; a process may outlive it."""
    end = f"scancel {held.job}" if held.job and job != "ended" else f"kill {held.pid} on {held.host}"
    return (
        f"{folder} is in use: {held} has owned it since {held.since}, and is alive. Wait for its end, end it ({end}), "
        f"or give another run.dir. Its lock is {folder / LOCK}"
    )


def refuse_if_in_use(
    folder: Path, *, timing: Timing = TIMING, watches: bool = True, on_wait: Callable[[str], None] = lambda line: None
) -> None:
    """Raises UserError if another process owns the run. Changes nothing.

    watches: also wait for the end of an owner whose job Slurm is ending, and look whether an owner on another machine
    lives, for one and a half of its heartbeats. on_wait: gets a line before it waits for the end of a job.
    """
    path = folder / LOCK
    with about("run.dir"), disk_errors(folder), suppress(NotADirectoryError):
        if (held := read_lock(path)) is None:
            return
        if not watches:
            state, job = process_state(held), "unknown"
        else:
            state, job = owner_state(path, held, timing=timing, on_wait=on_wait)
        seems_alive = state == "unknown" and watches and job != "ended" and _beats(path, held, timing)
        if state == "lives" or seems_alive:
            raise InUse(in_use(folder, held, job=job))


def _beats(path: Path, held: Owner, timing: Timing) -> bool:
    """Whether there is a heartbeat of this owner within one and a half times the usual time."""
    first, end = heartbeat(path, held), time.monotonic() + 1.5 * timing.renew
    while time.monotonic() < end:
        time.sleep(min(1.0, timing.renew / 4))
        if (now := heartbeat(path, held)) != first:
            return now is not None
    return False
