"""Runs a command whose processes all end with the process that started this one, whatever ended that.

`python -m megatron_paint.runtime.guard PARENT FOLDER COMMAND...`, with a pipe as its standard input. The kernel kills
only direct children of a process that died. The command's own children would stay, and hold their GPUs. So this process
waits for the command, and kills the command's process group when PARENT closes the pipe or is gone. Signals do not end
it, nor the command, unless it handles them itself. Python's shared memory of killed processes would stay in /dev/shm,
so it is removed too. FOLDER, unless it is empty text, is removed when PARENT has died.
"""

import ctypes
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from megatron_paint.runtime.processes import SET_PARENT_DEATH_SIGNAL

PARENT_DIED = signal.SIGHUP  # from the kernel
ENVIRONMENT = "MEGATRON_PAINT_GUARDED"  # variable with the command's environment as JSON; without it, it is inherited
POLL_SECONDS = 0.2
REMOVE_SECONDS = 30.0
# The names that Python's multiprocessing gives to shared memory and semaphores.
SHARED_MEMORY = re.compile(rb"/dev/shm/(?:psm_|sem\.mp-)[\w-]+")


def main() -> int:
    """Returns the exit status of the command; 128 + N if signal N ended it."""
    parent, folder, command = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
    environment = json.loads(os.environ.pop(ENVIRONMENT, "null"))
    died: list[int] = []
    signal.signal(PARENT_DIED, lambda number, frame: died.append(number))
    # A batch system sends the signals that ask a run to stop to every process of the job. The command ignores them too,
    # because it inherits this.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, int(PARENT_DIED))
    process = subprocess.Popen(command, start_new_session=True, stdin=subprocess.DEVNULL, env=environment)
    while process.poll() is None and not died and os.getppid() == parent:
        if select.select([sys.stdin], [], [], POLL_SECONDS)[0]:  # the pipe is closed
            break
    kill_group(process.pid)  # also what a command that has ended left behind
    status = process.wait()
    # The kernel sends its signal when the parent's main thread dies. Its other threads may still die after it.
    if folder and (died or os.getppid() != parent):
        remove(Path(folder))
    return status if status >= 0 else 128 - status


def remove(folder: Path) -> None:
    """Removes a folder into which other processes of the run may still write until they end."""
    deadline = time.monotonic() + REMOVE_SECONDS
    while folder.exists() and time.monotonic() < deadline:
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(POLL_SECONDS)


def kill_group(group: int) -> None:
    """Kills all processes of a group, and removes the shared memory that they had in common."""
    shared = {name for pid in members_of(group) for name in shared_memory_of(pid)}
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)
    for name in shared:
        Path(name).unlink(missing_ok=True)


def members_of(group: int) -> list[int]:
    """The processes of a group."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, IndexError, ValueError):
            # The name in parentheses may hold spaces and parentheses; the third field behind it is the group.
            if int((folder / "stat").read_text().rpartition(")")[2].split()[2]) == group:
                found.append(int(folder.name))
    return found


def shared_memory_of(pid: int) -> set[str]:
    """The paths of Python's shared memory that a process has mapped."""
    with suppress(OSError):
        return {name.decode() for name in SHARED_MEMORY.findall(Path(f"/proc/{pid}/maps").read_bytes())}
    return set()


if __name__ == "__main__":
    sys.exit(main())
