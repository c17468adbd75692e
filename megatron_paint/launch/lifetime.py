"""Processes that end with the one that started them, whatever ends it."""

import ctypes
import os
import signal
import sys

LAUNCHER = "MEGATRON_PAINT_LAUNCHER"  # variable with the launcher's process id
SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux's prctl


def end_with_launcher() -> None:
    """In a rank that our launcher started: to be killed as soon as the launcher is gone."""
    launcher = os.environ.get(LAUNCHER)
    if launcher is not None:
        end_with_parent()
        if sys.platform == "linux" and os.getppid() != int(launcher):
            os._exit(1)  # it went before the kernel was told


def end_with_parent() -> None:
    """Has the kernel kill this process when its parent dies; only Linux can, elsewhere nothing is done."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, int(signal.SIGKILL))


def start_worker() -> None:
    """In a worker process of a pool: Ctrl-C is for its parent, whose end is its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
