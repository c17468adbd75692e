"""Runs work in a separate process with a time limit, because drivers and dead file systems can hang forever."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from megatron_paint.runtime.processes import end_with_parent

ReportProgress = Callable[[str], None]  # reports how far the work has come

END_SECONDS = 3.0  # time for all ended processes to disappear; with a GPU, or a disk that hangs, that takes a while
_running: list["TimedProcess"] = []


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a timed process ended: with a value, or with the reason why there is none."""

    value: Any = None
    problem: str = ""  # empty if there is a value
    kind: str = "done"  # or "error": it raised; "killed": it died of a signal; "stalled": its time was up
    reached: str = ""  # the last progress that it reported


class TimedProcess:
    """Starts `work(report)` in a fork of this process.

    This process must not have used a GPU or parallel arithmetic before.
    """

    def __init__(self, work: Callable[[ReportProgress], Any]) -> None:
        fork = multiprocessing.get_context("fork")
        self._receiver, sender = fork.Pipe(duplex=False)
        self._process = fork.Process(target=_child_main, args=(work, sender, os.getpid()), daemon=True)
        _running.append(self)  # before the start: a signal may come as soon as it has started
        self._process.start()
        sender.close()

    def outcome(self, deadline: float) -> Outcome:
        """Waits for its end, at most until `deadline` (time.monotonic). Kills the process at the deadline."""
        reached, result = "", None
        try:
            while result is None and self._receiver.poll(max(0.0, deadline - time.monotonic())):
                kind, content = self._receiver.recv()
                if kind == "reached":
                    reached = content
                else:
                    result = Outcome(value=content, reached=reached) if kind == "done" else _error(content, reached)
        except (EOFError, OSError):
            self._process.join(1.0)
            code = self._process.exitcode or 0
            name = signal.Signals(-code).name if code < 0 else f"exit status {code}"
            result = Outcome(problem=f"its process died of {name}", kind="killed", reached=reached)
        self.kill()
        self._receiver.close()
        if result is not None:
            self._process.join(0.5)  # it may hold a GPU that the next process needs
        return result or Outcome(problem="it did not end in time", kind="stalled", reached=reached)

    def kill(self) -> None:
        """Kills the process and returns at once: other processes may still have to be killed."""
        if self._process.pid is not None:
            self._process.kill()

    def wait(self, deadline: float) -> None:
        """Waits until the process is gone, at most until `deadline` (time.monotonic)."""
        if self._process.pid is not None:
            self._process.join(max(0.0, deadline - time.monotonic()))


def end_all() -> None:
    """Ends every timed process. A process that the kernel holds in a disk wait is left to the kernel."""
    processes, deadline = list(_running), time.monotonic() + END_SECONDS
    for process in processes:
        process.kill()
    for process in processes:
        process.wait(deadline)
    _running[:] = [process for process in _running if process not in processes]


def run_timed(work: Callable[[], Any], seconds: float) -> Outcome:
    """Runs one piece of work and waits for it."""
    return TimedProcess(lambda _: work()).outcome(time.monotonic() + seconds)


def _error(text: str, reached: str) -> Outcome:
    return Outcome(problem=text, kind="error", reached=reached)


def _child_main(work: Callable[[ReportProgress], Any], sender: Connection, parent: int) -> None:
    end_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        message = ("done", work(lambda text: sender.send(("reached", text))))
    except Exception as error:  # any exception of a check is its result, reported as one line
        lines = str(error).strip().splitlines()
        message = ("error", lines[0] if lines else type(error).__name__)
    sender.send(message)
    os._exit(0)
