"""Runs in which something goes wrong at a set step: targets for `tests.end_to_end.ranks`."""

import os
import signal
import sys
import time

from megatron_paint import cli
from megatron_paint.objectives import Paint
from megatron_paint.run.heartbeat import Heart

AT = 2


def _before_step(act) -> None:
    """Runs the command line with `act(step)` before each of PAINT's steps."""
    whole = Paint.step

    def step(self, policy, problems, *, step, lr):
        act(step)
        return whole(self, policy, problems, step=step, lr=lr)

    Paint.step = step
    sys.exit(cli.main(sys.argv[1:]))


def signalled() -> None:
    """Rank 1 is told to stop in step 2, and once more in the same step."""

    def act(step: int) -> None:
        if step == AT and int(os.environ["RANK"]) == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGTERM)

    _before_step(act)


def not_finite() -> None:
    """Steps 2 and 3 have a loss that is not a number."""

    def act(step: int) -> None:
        if step in (AT, AT + 1):
            raise FloatingPointError(f"loss is not finite in step {step}")

    _before_step(act)


def hanging() -> None:
    """Rank 1 never comes to the sampling of step 2."""

    def hang_here() -> None:
        while True:
            time.sleep(0.1)

    def act(step: int) -> None:
        if step == AT and int(os.environ["RANK"]) == 1:
            hang_here()

    _before_step(act)


def in_a_job() -> None:
    """The last argument is when the job ends, as Slurm would tell in the environment."""
    os.environ["SLURM_JOB_END_TIME"] = sys.argv.pop()
    sys.exit(cli.main(sys.argv[1:]))


def killed() -> None:
    """The last argument, RANK:N, is the rank that dies at its N-th sign of life (a token, a micro-batch, a phase) after
    the start, or at the -N-th within it."""
    rank, number = map(int, sys.argv.pop().split(":"))
    if int(os.environ["RANK"]) == rank:
        whole, counts = Heart.beat, {True: 0, False: 0}

        def beat(self, *arguments, **options):
            whole(self, *arguments, **options)
            started = self._state[1] > 0
            counts[started] += 1
            if counts[started] == (number if started else -number):
                self._write()  # for the test to see in which phase
                os.kill(os.getpid(), signal.SIGKILL)

        Heart.beat = beat
    sys.exit(cli.main(sys.argv[1:]))
