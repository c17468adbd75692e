"""Runs in which something goes wrong at a set step: targets for `tests.support.forked_ranks`."""

import itertools
import json
import os
import signal
import sys
import threading
import time

from megatron_paint.__main__ import run
from megatron_paint.mcore import checkpoint, distributed_format
from megatron_paint.mcore.async_writer import Writer
from megatron_paint.mcore.policy import MegatronPolicy
from megatron_paint.objectives import Paint
from megatron_paint.run.folder import RunFolder
from megatron_paint.runtime import files
from megatron_paint.runtime.files import NewFolder
from megatron_paint.runtime.heartbeat import Watchdog, mark_progress
from megatron_paint.runtime.stop import StopRequest

AT = 2
CALLS = {
    "copy": (checkpoint, "copy_distributed"),
    "write": (distributed_format.FileSystemWriter, "write_data"),
    "checksum": (checkpoint, "checksums_of"),
    "metadata": (distributed_format.core, "save_config"),
    "flush": (files, "sync"),
    "rename": (files.os, "replace"),
    "finish": (NewFolder, "finish"),
    "remove": (RunFolder, "remove_checkpoints"),
    "record": (RunFolder, "append_metrics"),
}


def _before_step(act) -> None:
    """Runs the command line with `act(step)` before each of PAINT's steps."""
    unspoilt = Paint.step

    def step(self, policy, problems, *, step, **values):
        act(step)
        return unspoilt(self, policy, problems, step=step, **values)

    Paint.step = step
    run()


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
    """Rank 1 never comes to the sampling of step 2. Its last sign of life is later than that of rank 0, which waits."""

    def hang_here() -> None:
        time.sleep(1.0)
        mark_progress()
        while True:
            time.sleep(0.1)

    def act(step: int) -> None:
        if step == AT and int(os.environ["RANK"]) == 1:
            hang_here()

    _before_step(act)


def signalled_at_the_start() -> None:
    """Rank 1 is told to stop while it makes its model."""
    whole = MegatronPolicy.__init__

    def make(self, *arguments, **options):
        whole(self, *arguments, **options)
        if int(os.environ["RANK"]) == 1:
            os.kill(os.getpid(), signal.SIGUSR1)

    MegatronPolicy.__init__ = make
    run()


def in_a_job_that_ends_soon() -> None:
    """The job ends in 200 s, as Slurm tells in the environment."""
    os.environ["SLURM_JOB_END_TIME"] = str(time.time() + 200)
    run()


def in_a_job_that_ends_in_step_1() -> None:
    """By step 1 there are 200 s left."""
    requests, whole = [], StopRequest.__enter__

    def enter(self):
        requests.append(self)
        return whole(self)

    def act(step: int) -> None:
        if step == 1:
            requests[0].end_at = time.time() + 200

    StopRequest.__enter__ = enter
    _before_step(act)


def slow_to_write() -> None:
    """The checkpoint of step 2 waits until step 4 begins; then rank 0 says which checkpoints there are."""
    may_write, whole = threading.Event(), Writer.start

    def start(self, write):
        def write_later(ranks):
            assert may_write.wait(300)
            write(ranks)

        whole(self, write_later)

    def act(step: int) -> None:
        if step == 2 * AT:
            if int(os.environ["RANK"]) == 0:
                run = next(argument for argument in sys.argv if argument.startswith("run.dir=")).removeprefix(
                    "run.dir="
                )
                found = RunFolder(run).checkpoints()
                print(json.dumps({"event": "held", "message": f"checkpoints after step {step - 1}: {found}"}))
            may_write.set()

    Writer.start = start
    _before_step(act)


def killed() -> None:
    """The last argument, RANK:WHERE:N, is the rank that dies, and at what: at its N-th sign of life (a token, a
    micro-batch) in a phase, or before its first step ("start"), or at the N-th call of one of `CALLS`."""
    rank, where, number = sys.argv.pop().split(":")
    if int(os.environ["RANK"]) == int(rank):
        count = itertools.count(1)

        def die_in_time() -> None:
            if next(count) == int(number):
                os.kill(os.getpid(), signal.SIGKILL)

        if where in CALLS:
            owner, name = CALLS[where]
            call = getattr(owner, name)
            setattr(owner, name, lambda *arguments, **options: (die_in_time(), call(*arguments, **options))[1])
        else:
            whole = Watchdog.mark_progress

            def mark_progress(self, *arguments, **options):
                whole(self, *arguments, **options)
                phase, step, _ = self._state
                if where == (phase if step else "start"):
                    die_in_time()

            Watchdog.mark_progress = mark_progress
    run()
