"""`megatron-paint` as a user starts it, whose ranks are forked: nothing is imported a second time.

The launcher itself is the real one. What it starts with `subprocess.Popen([python, "-m", "megatron_paint", ...])`
becomes a fork of this process that does what the new Python would do, in the state that it would be in.
"""

import atexit
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from typing import IO

from megatron_paint.__main__ import run as command_line
from tests.support.forks import end_after

POPEN = subprocess.Popen
POLL_SECONDS = 0.01


class ForkedRank:
    """What the launcher uses of `subprocess.Popen`."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], output: IO[bytes] | None = None) -> None:
        self.args, self.returncode = command, None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            if output is not None:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
            end_after(partial(_rank, command, environment, closes=output is None))
        os.setpgid(self.pid, self.pid)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self) -> int:
        while self.poll() is None:
            time.sleep(POLL_SECONDS)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def _rank(command: Sequence[str], environment: Mapping[str, str], *, closes: bool) -> None:
    """Runs the command in this fork, as if it were a new Python: nothing of the launcher's is left.

    closes: close the launcher's files. A search has none that a trial would disturb, and its objects still know the
    numbers of theirs: they would close what the trial opens under these numbers.
    """
    os.setpgid(0, 0)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if closes:
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # such as the store that the launcher listens at
    weakref.finalize._registry.clear()  # the launcher's temporary folder
    atexit._clear()
    os.environ.clear()
    os.environ.update(environment)
    subprocess.Popen = POPEN
    sys.argv[1:] = command[3:]
    command_line()


def _popen(
    command: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    stdout: IO[bytes] | None = None,
    **options: object,
):
    if list(command[:3]) == [sys.executable, "-m", "megatron_paint"]:
        both = {} if stdout is None else {"stderr": subprocess.STDOUT}
        assert options == {"stdin": subprocess.DEVNULL, "process_group": 0} | both, options
        return ForkedRank(command, os.environ if env is None else env, stdout)
    return POPEN(command, env=env, stdout=stdout, **options)


def run() -> None:
    """The command line, with forked ranks."""
    subprocess.Popen = _popen
    command_line()
