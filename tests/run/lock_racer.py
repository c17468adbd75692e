"""A process that takes the lock of a run folder. `test_lock.py` starts many of them.

python -m tests.run.lock_racer MODE FOLDER JOURNAL: appends to JOURNAL, a file in which every owner notes when it begins
and ends, and prints one line.
"""

import fcntl
import os
import sys
import time
from pathlib import Path

from megatron_paint.base.errors import UserError
from megatron_paint.run.lock import RunLock
from megatron_paint.run.lock_watch import Timing

TIMING = Timing(renew=0.1, look=0.5, limit=1.5, completing=3.0, poll=0.05)


def note(journal: Path, text: str) -> None:
    """Appends a line while no other process does."""
    with open(journal, "a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        stream.write(f"{text} {os.getpid()} {time.monotonic():.6f}\n")


def own(folder: Path, journal: Path, seconds: float) -> None:
    """Takes the lock once and holds it for a while; prints who owns the run if another process does."""
    lock = RunLock(folder, timing=TIMING)
    try:
        line = lock.take()
    except UserError as error:
        print(f"refused: {error}", flush=True)
        return
    note(journal, "begin")
    print(f"owner {os.getpid()}: {line}", flush=True)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        lock.confirm()
        time.sleep(0.005)
    note(journal, "end")
    lock.release()


def main() -> None:
    mode, folder, journal = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    if mode == "ready":  # many wait until the moment that they are told
        print("ready", flush=True)
        sys.stdin.readline()
        own(folder, journal, 0.05)
    else:
        own(folder, journal, float(mode))


if __name__ == "__main__":
    main()
