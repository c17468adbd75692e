"""A piece of work in a process of its own with a time limit, because drivers and dead file systems hang for ever."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from megatron_paint.runtime.processes import end_with_parent

Tell = Callable[[str], None]  # says how far the work has come

END_SECONDS = 3.0  # for all that were ended to be gone; with a GPU, or a disk that hangs, that takes a while
_running: list["Errand"] = []


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How an errand ended: with a value, or with the reason why there is none."""

    value: Any = None
    problem: str = ""  # empty if there is a value
    kind: str = "done"  # or "error": it raised; "killed": it died of a signal; "stalled": its time was up
    reached: str = ""  # what it told last


class Errand:
    """Starts `act(tell)` in a fork of this process, which must have touched no GPU and run no parallel arithmetic."""

    def __init__(self, act: Callable[[Tell], Any]) -> None:
        fork = multiprocessing.get_context("fork")
        self._receiver, sender = fork.Pipe(duplex=False)
        self._process = fork.Process(target=_work, args=(act, sender, os.getpid()), daemon=True)
        _running.append(self)  # first: a signal may come as soon as it has started
        self._process.start()
        sender.close()

    def outcome(self, deadline: float) -> Outcome:
        """Waits until it has ended, at most until `deadline` (time.monotonic), and ends it then."""
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
            self._process.join(0.5)  # it may hold a GPU that the next one needs
        return result or Outcome(problem="it did not end in time", kind="stalled", reached=reached)

    def kill(self) -> None:
        """Ends the process, whatever it does, and does not wait until it is gone: others may be still to be ended."""
        if self._process.pid is not None:
            self._process.kill()

    def wait(self, deadline: float) -> None:
        """Waits until the process is gone, at most until `deadline` (time.monotonic)."""
        if self._process.pid is not None:
            self._process.join(max(0.0, deadline - time.monotonic()))


def end_all() -> None:
    """Ends every errand of this process; one that the kernel holds in a disk's wait is left to the kernel."""
    errands, deadline = list(_running), time.monotonic() + END_SECONDS
    for errand in errands:
        errand.kill()
    for errand in errands:
        errand.wait(deadline)
    _running[:] = [errand for errand in _running if errand not in errands]


def carry_out(act: Callable[[], Any], seconds: float) -> Outcome:
    """Does one piece of work at once."""
    return Errand(lambda _: act()).outcome(time.monotonic() + seconds)


def _error(text: str, reached: str) -> Outcome:
    return Outcome(problem=text, kind="error", reached=reached)


def _work(act: Callable[[Tell], Any], sender: Connection, parent: int) -> None:
    end_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        message = ("done", act(lambda text: sender.send(("reached", text))))
    except Exception as error:  # whatever a check raises is its result, told as one line
        lines = str(error).strip().splitlines()
        message = ("error", lines[0] if lines else type(error).__name__)
    sender.send(message)
    os._exit(0)
