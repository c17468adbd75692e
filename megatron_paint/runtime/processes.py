"""Lets a process end together with the process that started it, whatever ended that one."""

import ctypes
import multiprocessing
import os
import signal
import sys

LAUNCHER = "MEGATRON_PAINT_LAUNCHER"  # variable with the launcher's process id
SEARCH = "MEGATRON_PAINT_SEARCH"  # variable with the process id of the search that started this run
SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux's prctl


def end_with_launcher() -> None:
    """In a rank of our launcher: the kernel kills this rank as soon as the launcher is gone.

    Ctrl-C is the launcher's, which passes it on. Before this rank can stop with a checkpoint, it ends this rank without
    a traceback. A trial of a search ends with the search in the same way; its ranks do not get that variable. A trial
    ignores SIGTERM: Slurm sends that to the search, to this process and to its ranks, and the search then asks it to
    stop with SIGUSR1. Two signals would end the ranks without a checkpoint.
    """
    if search := os.environ.pop(SEARCH, None):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        end_with_parent(int(search))
    launcher = os.environ.get(LAUNCHER)
    if launcher is not None:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        end_with_parent(int(launcher))


def has_launcher() -> bool:
    """Whether our launcher started this process."""
    return LAUNCHER in os.environ


def end_with_parent(parent: int | None = None) -> None:
    """Makes the kernel kill this process when its parent dies. Only Linux can do this; elsewhere nothing happens.

    parent: its process id. If the parent died before this call, this process ends here.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, int(signal.SIGKILL))
        if parent is not None and os.getppid() != parent:
            os._exit(1)


def start_worker() -> None:
    """In a worker process of a pool: it ignores Ctrl-C and USR1, which the parent handles, and ends with its parent."""
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    end_with_parent(parent.pid if parent is not None else None)
