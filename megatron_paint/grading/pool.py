"""Worker processes for questions that may never end. Each question has a hard time limit.

The workers are plain child processes that run worker.py or function_worker.py. Children of `multiprocessing` would
import the parent's main module: in a training run this loads torch and Megatron and starts a second training run.
"""

import contextlib
import json
import os
import select
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_paint.base.errors import UserError
from megatron_paint.grading.protocol import OWNER_PIPE

PACKAGE_ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 120.0  # limit for the imports of a worker on a busy machine
MATH_WORKER = ("megatron_paint.grading.worker",)
# Replies that a worker could not send.
LATE: dict[str, Any] = {"late": True}  # the time limit was exceeded
ENDED: dict[str, Any] = {"ended": True}  # the process ended


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of one question."""

    agrees: int | None  # index of the candidate that equals the gold answer
    timed_out: bool = False  # True: no verdict within the limits of time and memory


NO_VERDICT = Verdict(agrees=None, timed_out=True)


class Worker:
    """One child process. It works on at most one question at a time.

    program: a module of this package that speaks the protocol of worker.py, and its arguments.
    """

    def __init__(self, program: Sequence[str] = MATH_WORKER) -> None:
        paths = [os.path.abspath(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
        # Only this process holds the write end. The worker reads its end when this process is gone, killed or not.
        owner, self._owner_pipe = os.pipe()
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "OMP_NUM_THREADS": "1",
            OWNER_PIPE: str(owner),
        }
        # Slurm sends its stop signals to all processes of a run. A worker would die in the middle of a question.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1))
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *program],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                cwd=PACKAGE_ROOT,  # `-m` puts it on the path, so the child imports the same package
                env=environment,
                pass_fds=(owner,),
                bufsize=0,
                start_new_session=True,  # Ctrl-C reaches only the parent, which closes its workers
            )
        except BaseException:
            os.close(self._owner_pipe)
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            os.close(owner)
        os.set_blocking(self.process.stdin.fileno(), False)
        self.ready = False
        self.index: int | None = None
        self.deadline = time.monotonic() + START_SECONDS
        self._received = b""

    def ask(self, index: int, question: dict[str, Any], seconds: float) -> None:
        """Sends one question and starts its time limit. A dead worker is noticed when its reply is read."""
        self.index, self.deadline = index, time.monotonic() + seconds
        with contextlib.suppress(OSError):
            self._send(json.dumps({**question, "seconds": seconds}).encode("ascii") + b"\n")

    def _send(self, message: bytes) -> None:
        """Writes a message. One that does not fit into the pipe waits, at most until the deadline, for the reader."""
        pipe, rest = self.process.stdin.fileno(), memoryview(message)
        writable = select.poll()
        writable.register(pipe, select.POLLOUT)
        while rest and (remaining := self.deadline - time.monotonic()) > 0:
            if writable.poll(1000 * remaining):
                with contextlib.suppress(BlockingIOError):
                    rest = rest[os.write(pipe, rest) :]

    def receive(self) -> dict[str, Any]:
        """Returns the next complete message, {} if there is none yet, or ENDED if the process has ended."""
        part = os.read(self.process.stdout.fileno(), 65536)
        self._received += part
        if b"\n" in self._received:
            line, self._received = self._received.split(b"\n", 1)
            return json.loads(line)
        return {} if part else ENDED

    def died_idle(self) -> bool:
        """Tells whether the process was killed from outside while it had no question."""
        return self.ready and self.index is None and self.process.poll() is not None

    def close(self) -> None:
        """Kills the process, with all that it has started in its session, and closes its pipes."""
        if self.process.returncode is None:  # not waited for, so its number still is its own
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
        os.close(self._owner_pipe)


class WorkerPool:
    """Up to `workers` processes, which answer questions in any order. They start when they are first needed.

    program: what each worker runs. failure: the first words of the error if no worker can start.
    """

    def __init__(
        self,
        workers: int,
        *,
        program: Sequence[str] = MATH_WORKER,
        failure: str = "A grading worker could not start",
        on_verdict: Callable[[], None] = lambda: None,
    ) -> None:
        self.size, self._program, self._failure, self._on_verdict = workers, program, failure, on_verdict
        self._owner = os.getpid()
        self._workers: list[Worker] = []
        self._selector = selectors.DefaultSelector()

    def judge(self, questions: Sequence[dict[str, Any]], *, seconds: float) -> list[Verdict]:
        """Returns math-verify's verdicts in the order of the questions. Each question has `seconds` of wall time."""
        replies = self.ask(questions, seconds=seconds)
        return [Verdict(agrees=reply["agrees"]) if "agrees" in reply else NO_VERDICT for reply in replies]

    def ask(self, questions: Sequence[dict[str, Any]], *, seconds: float) -> list[dict[str, Any]]:
        """Returns the replies in the order of the questions. Each question has `seconds` of wall time.

        A reply is LATE after the time limit, and ENDED if the process ended. The worker is replaced then.
        """
        replies: list[dict[str, Any]] = [LATE] * len(questions)
        pending = deque(range(len(questions)))
        try:
            while pending or any(worker.index is not None for worker in self._workers):
                for worker in [worker for worker in self._workers if worker.died_idle()]:
                    self._drop(worker)
                while pending and len(self._workers) < min(self.size, len(questions)):
                    self._start()
                for worker in self._workers:
                    if pending and worker.ready and worker.index is None:
                        index = pending.popleft()
                        worker.ask(index, questions[index], seconds)
                for worker, message in self._wait():
                    self._take(worker, message, replies)
        except BaseException:
            self.close()  # a worker whose reply is half read would send it as the reply to the next question
            raise
        return replies

    def close(self) -> None:
        """Ends all workers. The pool can be used again. In a fork of the process that started them it does nothing."""
        if os.getpid() == self._owner:
            for worker in list(self._workers):
                self._drop(worker)

    def _start(self) -> None:
        worker = Worker(self._program)
        self._workers.append(worker)
        self._selector.register(worker.process.stdout, selectors.EVENT_READ, worker)

    def _drop(self, worker: Worker) -> None:
        self._workers.remove(worker)
        self._selector.unregister(worker.process.stdout)
        worker.close()

    def _wait(self) -> list[tuple[Worker, dict[str, Any]]]:
        """Waits for messages. Returns each worker with its message, which is LATE for one that ran out of time."""
        busy = [worker for worker in self._workers if worker.index is not None or not worker.ready]
        remaining = min(worker.deadline for worker in busy) - time.monotonic()
        events = [(key.data, key.data.receive()) for key, _ in self._selector.select(max(remaining, 0.0))]
        answered = [worker for worker, _ in events]
        now = time.monotonic()
        return events + [(worker, LATE) for worker in busy if worker not in answered and worker.deadline <= now]

    def _take(self, worker: Worker, message: dict[str, Any], replies: list[dict[str, Any]]) -> None:
        """Handles one message. A lost worker is dropped and replaced when one is needed.

        A worker that never became ready is not replaced while there are others: the pool becomes smaller.
        """
        if not message:
            return
        lost = message is LATE or message is ENDED
        if not worker.ready:
            if lost and len(self._workers) > 1:
                self._drop(worker)
                self.size = len(self._workers)
            elif lost or "unusable" in message:
                self._fail(message)
            else:
                worker.ready = True
            return
        if worker.index is not None:
            replies[worker.index] = message
            self._on_verdict()
        worker.index = None
        if lost or message.get("leave"):
            self._drop(worker)

    def _fail(self, message: dict[str, Any]) -> None:
        reason = message.get("unusable") or f"it ended, or it was not ready after {START_SECONDS:.0f} s"
        raise UserError(f"{self._failure}: {reason}")
