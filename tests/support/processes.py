"""Processes of this machine, as Linux lists them in /proc."""

import time
from pathlib import Path


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not collected yet does not."""
    return bool(fields := _fields(pid)) and fields[0] != "Z"


def descendants(pid: int) -> list[int]:
    """Children of a process, theirs, and so on. OSError: it has ended."""
    found = children(pid)
    return [*found, *(grandchild for child in found for grandchild in descendants(child))]


def children(pid: int) -> list[int]:
    """In the order in which they were started. OSError: the process has ended."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def of_session(session: int) -> dict[int, str]:
    """Command lines of the processes that run in a session, by process id."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        fields = _fields(int(folder.name))
        if fields and fields[0] != "Z" and int(fields[3]) == session:
            try:
                found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
    return found


def left_of_session(session: int, *, seconds: float = 30.0) -> dict[int, str]:
    """What still runs in a session after a while, which a grading worker may take to end."""
    deadline = time.monotonic() + seconds
    while (found := of_session(session)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def is_pending(pid: int, number: int) -> bool:
    """Whether a signal was sent to a process that has not handled it yet, such as one that is suspended."""
    lines = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return bool(int(lines["ShdPnd"], 16) >> (number - 1) & 1)


def _fields(pid: int) -> list[str]:
    """State, parent, process group, session, and so on; empty for a process that has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
