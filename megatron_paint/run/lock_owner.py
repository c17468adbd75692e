"""The process that owns a run, as its lock file names it, and whether that process still exists."""

import json
import os
import socket
import subprocess
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

BOOT = Path("/proc/sys/kernel/random/boot_id")
PROCESSES = Path("/proc/self/ns/pid")
# States of a Slurm job whose processes may exist, besides COMPLETING. PENDING is none: a requeued job waits in it.
ACTIVE = {"RUNNING", "SUSPENDED", "STOPPED", "CONFIGURING", "SIGNALING", "STAGE_OUT", "RESIZING"}
SQUEUE_SECONDS = 30


@dataclass(frozen=True, kw_only=True)
class Owner:
    """One start of a run."""

    token: str  # unique to this start
    host: str
    machine: str  # boot of the kernel, and namespace of process ids: only there `pid` has a meaning
    pid: int
    started: int | None  # when the process started, in clock ticks since the boot; None: not known
    cluster: str  # "" outside Slurm, as are the next two
    job: str
    restart: int
    since: str  # when the lock was taken, by the owner's clock

    def __str__(self) -> str:
        job = f", Slurm job {self.job}" if self.job else ""
        job += f" restart {self.restart}" if self.job and self.restart else ""
        return f"process {self.pid} on {self.host}{job}"


def this_process(environ: Mapping[str, str] = os.environ) -> Owner:
    """This process as an owner, with a new token."""
    return Owner(
        token=uuid.uuid4().hex,
        host=socket.gethostname(),
        machine=this_machine(),
        pid=os.getpid(),
        started=_start_time(os.getpid())[0],
        cluster=environ.get("SLURM_CLUSTER_NAME", ""),
        job=environ.get("SLURM_JOB_ID", ""),
        restart=int(environ.get("SLURM_RESTART_COUNT") or 0),
        since=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def to_text(owner: Owner) -> str:
    """The content of a lock file."""
    return json.dumps(asdict(owner), indent=1) + "\n"


def from_text(text: str, *, unreadable: str) -> Owner:
    """The owner in a lock file. unreadable: the token of a file that names none, such as one that is cut short."""
    with suppress(ValueError, TypeError, KeyError):
        values = json.loads(text)
        return Owner(**{field.name: values[field.name] for field in fields(Owner)})
    return Owner(
        token=unreadable,
        host="an unknown host",
        machine="",
        pid=0,
        started=None,
        cluster="",
        job="",
        restart=0,
        since="",
    )


def this_machine() -> str:
    """What distinguishes process ids; "" if that is not known. Hosts may share a name, and containers a kernel."""
    try:
        return f"{BOOT.read_text().strip()} {os.readlink(PROCESSES)}"
    except OSError:  # not Linux
        return ""


def process_state(owner: Owner) -> Literal["gone", "lives", "unknown"]:
    """Whether the owner's process exists. Only processes of this machine are known."""
    if not owner.machine or owner.machine != this_machine():
        return "unknown"
    try:
        os.kill(owner.pid, 0)
    except ProcessLookupError:
        return "gone"
    except PermissionError:  # of another user
        pass
    started, is_zombie = _start_time(owner.pid)
    if is_zombie:
        return "gone"
    if started is None or owner.started is None:
        return "unknown"
    return "lives" if started == owner.started else "gone"


def _start_time(pid: int) -> tuple[int | None, bool]:
    """Start of a process in clock ticks since the boot, and whether it has ended and nobody has collected it."""
    try:
        values = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None, False
    return int(values[19]), values[0] in "ZX"


JobState = Literal["active", "completing", "ended", "unknown"]


def job_state(owner: Owner, environ: Mapping[str, str] = os.environ) -> JobState:
    """What Slurm knows of the attempt that the owner belongs to.

    ended: the same job was restarted since, or its job is not active any more. completing: Slurm is ending its job, and
    this process belongs to another job. Its processes may live for `KillWait` and write in this time. unknown: Slurm
    cannot be asked. It can be asked only about a job of the same cluster.
    """
    if not owner.job or not owner.cluster or owner.cluster != environ.get("SLURM_CLUSTER_NAME"):
        return "unknown"
    own = environ.get("SLURM_JOB_ID")
    if owner.job == own:
        return "ended" if owner.restart < int(environ.get("SLURM_RESTART_COUNT") or 0) else "active"
    command = ["squeue", "--noheader", "--states=all", f"--jobs={owner.job}", "--format=%T"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SQUEUE_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    if done.returncode:  # Slurm forgets a job some minutes after its end
        return "ended" if "Invalid job id" in done.stderr else "unknown"
    states = set(done.stdout.split())
    if ACTIVE & states or ("COMPLETING" in states and not own):
        return "active"
    return "completing" if "COMPLETING" in states else "ended"
