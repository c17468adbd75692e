"""Requests to stop a run: by a signal, or because the time of the job is nearly over."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import FrameType

from megatron_paint.runtime.signals import RecordedSignals

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
STOPPED = 75  # EX_TEMPFAIL: stopped early with a checkpoint; the same command resumes


class StopRequested(Exception):
    """The run ends after step `step`, because of `reason`."""

    def __init__(self, *, step: int, reason: str) -> None:
        super().__init__(reason)
        self.step, self.reason = step, reason


class StopRequest(RecordedSignals):
    """Records between `__enter__` and `__exit__` that this process was asked to stop. It interrupts nothing.

    Further signals change nothing, so that a checkpoint in progress is completed. Only the second Ctrl-C in a process
    that is no rank of a launcher raises KeyboardInterrupt. end_at: when the job ends, in seconds since 1970; None:
    never. margin: seconds before that at which to stop. on_interrupt: called at the first such Ctrl-C.
    """

    def __init__(
        self,
        *,
        margin: float = 0.0,
        clock: Callable[[], float] = time.time,
        on_interrupt: Callable[[], None] = lambda: None,
    ) -> None:
        # Even if they are ignored: a job script makes its launchers ignore them, and ranks inherit that. A shell makes
        # its background jobs ignore SIGINT, which is not for them.
        super().__init__(STOPPING, also_ignored={signal.SIGTERM, signal.SIGUSR1})
        self.end_at: float | None = None
        self._margin, self._clock, self._on_interrupt = margin, clock, on_interrupt
        self._interrupts = 0

    def _record(self, number: int, frame: FrameType | None) -> None:
        super()._record(number, frame)
        if number == signal.SIGINT and "RANK" not in os.environ:
            self._interrupts += 1
            if self._interrupts > 1:
                raise KeyboardInterrupt
            self._on_interrupt()

    def reason(self, *, next_seconds: float = 0.0) -> str | None:
        """Why to stop; None while there is no reason. next_seconds: time until the next call."""
        if self.signal is not None:
            return self.signal.name
        if self.end_at is not None and self._clock() + next_seconds >= self.end_at - self._margin:
            left = max(0.0, self.end_at - self._clock())
            return f"the job's time limit in {left:.0f} s (run.exit_before_limit_s={self._margin:g})"
        return None


def job_end(environ: Mapping[str, str] = os.environ) -> float | None:
    """When Slurm will end this job, in seconds since 1970; None outside a job or without a time limit."""
    if "SLURM_JOB_END_TIME" in environ:
        return float(environ["SLURM_JOB_END_TIME"])
    if "SLURM_JOB_ID" not in environ:
        return None
    # Slurm before 23.02 sets no such variable, so ask the controller.
    command = ["squeue", "--noheader", f"--jobs={environ['SLURM_JOB_ID']}", "--format=%e"]
    with suppress(OSError, subprocess.SubprocessError, ValueError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        return time.mktime(time.strptime(done.stdout.strip(), "%Y-%m-%dT%H:%M:%S"))
    return None


def exit_status(environ: Mapping[str, str] = os.environ) -> int:
    """The exit status of a rank that stopped early. torchrun would treat every status except 0 as a failure."""
    return 0 if "TORCHELASTIC_RUN_ID" in environ else STOPPED
