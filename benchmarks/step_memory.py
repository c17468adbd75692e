"""The memory that an engine of step.py has used."""

import os
from pathlib import Path


def peak_bytes() -> int:
    """The largest resident memory of this process since its start, plus those of its child processes."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return sum(_peak_of(process) for process in ("self", *children))


def _peak_of(process: str) -> int:
    (line,) = (line for line in Path(f"/proc/{process}/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])
