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


def hold(task: int, libc: ctypes.CDLL) -> None:
    """Stops a thread; OSError if it cannot be stopped."""
    for request in (PTRACE_SEIZE, PTRACE_INTERRUPT):
        if libc.ptrace(request, task, None, None):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    os.waitpid(task, WALL)


def main() -> None:
    """The argument is the process id; prints `held` when all its threads are held.

    The kernel gives a signal to any thread that runs. It stays pending only if none does.
    """
    pid = int(sys.argv[1])
    libc = ctypes.CDLL(None, use_errno=True)
    held: set[int] = set()
    while new := {int(task) for task in os.listdir(f"/proc/{pid}/task")} - held:
        for task in new:
            hold(task, libc)
        held |= new
    threading.Thread(target=bury, args=[pid], daemon=True).start()
    print("held", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
