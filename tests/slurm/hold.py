"""Holds a process until stdin ends. Unlike after SIGSTOP, the signals that Slurm sends with TERM do not wake it."""

import ctypes
import os
import sys
import threading

PTRACE_SEIZE, PTRACE_INTERRUPT = 0x4206, 0x4207
WALL = 0x40000000  # of waitpid: any kind of child


def bury(pid: int) -> None:
    """A process that is held dies for its parent only when whoever holds it has seen it."""
    while not os.WIFSIGNALED(os.waitpid(pid, WALL)[1]):
        pass


def main() -> None:
    """The argument is the process id; prints `held` when the process is held."""
    pid = int(sys.argv[1])
    libc = ctypes.CDLL(None, use_errno=True)
    for request in (PTRACE_SEIZE, PTRACE_INTERRUPT):
        if libc.ptrace(request, pid, None, None):
            sys.exit(os.strerror(ctypes.get_errno()))
    os.waitpid(pid, WALL)
    threading.Thread(target=bury, args=[pid], daemon=True).start()
    print("held", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
