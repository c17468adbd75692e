"""Short runs of several ranks: one process imports everything once and forks the ranks of each run."""

import atexit
import functools
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.support.ports import free_port
from tests.support.processes import is_alive

ROOT = Path(__file__).parents[2]
COMMAND = "megatron_paint.__main__:run"
LAUNCHER = "tests.support.forked_launcher:run"
WORLD = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # of a launcher of the tests themselves
RANK = {"RANK": "{rank}", "LOCAL_RANK": "{rank}"}  # {rank} in a value is the number of the process


@dataclass(frozen=True)
class Kill:
    """All ranks end by SIGKILL `delay` seconds after rank 0's event-th open or rename below a folder."""

    below: Path
    event: int
    delay: float = 0.0


@dataclass(frozen=True)
class Ended:
    """How the ranks of a run ended: exit statuses, and what each printed."""

    statuses: list[int]
    out: list[str]
    err: list[str]
    cpu_seconds: float

    @property
    def message(self) -> str:
        """The one line that every rank ended with, after an error of the user's."""
        lines = {line for text in self.err for line in text.splitlines()}
        assert self.statuses == [2] * len(self.statuses), self
        assert len(lines) == 1, self
        (line,) = lines
        assert line.startswith("megatron-paint: error: "), self
        return line


class Running:
    """The forked processes of one job, which a test may kill or signal. One job runs at a time: `wait` for its end."""

    def __init__(self, server: subprocess.Popen, folder: Path, pids: list[int]) -> None:
        self.pids = pids
        self._server, self._folder = server, folder
        self._ended: Ended | None = None
        self._hung = False

    @property
    def pid(self) -> int:
        """Process id of the only process."""
        (pid,) = self.pids
        return pid

    @property
    def is_alive(self) -> bool:
        """Whether a process of the job still runs. The server collects those that have ended."""
        return any(map(is_alive, self.pids))

    def wait(self) -> Ended:
        """Waits until all processes of the job have ended. AssertionError: they did not within the job's limit."""
        if self._ended is None:
            answer = json.loads(self._server.stdout.readline())
            names = ("out", "err")
            out, err = ([(self._folder / f"{n}{i}").read_text() for i in range(len(self.pids))] for n in names)
            self._ended, self._hung = Ended(answer["statuses"], out, err, answer["cpu_seconds"]), answer["hung"]
            if "MEGATRON_PAINT_TEST_CPU" in os.environ:
                with open(os.environ["MEGATRON_PAINT_TEST_CPU"], "a") as stream:
                    stream.write(f"{self._ended.cpu_seconds:.1f} {os.environ.get('PYTEST_CURRENT_TEST')}\n")
        assert not self._hung, self._ended
        return self._ended


def start(
    folder: Path,
    *arguments: object,
    target: str = COMMAND,
    processes: int = 2,
    limit: float = 400.0,
    kill: Kill | None = None,
    file_size: dict[int, int] | None = None,
    environment: dict[str, str] | None = None,
) -> Running:
    """Forks so many processes, which call `target` with the arguments in `sys.argv`.

    folder: for their output. limit: seconds, after which all are killed. file_size: most bytes of a file that a rank
    may write. environment: what tells them which rank they are; by default what torchrun sets.
    """
    port = str(free_port())
    torchrun = RANK | {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return _start(
        folder,
        arguments,
        target=target,
        processes=processes,
        limit=limit,
        kill=None if kill is None else {"below": str(kill.below), "event": kill.event, "delay": kill.delay},
        file_size={str(rank): size for rank, size in (file_size or {}).items()},
        environment=torchrun if environment is None else environment,
        alone=False,
    )


def run(folder: Path, *arguments: object, **how: object) -> Ended:
    """Runs `target` in so many ranks to its end: see `start`."""
    return start(folder, *arguments, **how).wait()


def train(folder: Path, settings: Path, *overrides: str, **how: object) -> Ended:
    """`megatron-paint train SETTINGS key=value ... --json` in two ranks."""
    return run(folder, "train", settings, *overrides, "--json", **how)


def start_command(
    folder: Path, *arguments: object, target: str = LAUNCHER, limit: float = 400.0, file_size: int | None = None
) -> Running:
    """Forks one process that no launcher started, in a new session: `megatron-paint ARGUMENTS` as a user starts it.

    Ranks that it starts are forked too: see `forked_launcher`.
    """
    return _start(
        folder,
        arguments,
        target=target,
        processes=1,
        limit=limit,
        kill=None,
        file_size={} if file_size is None else {"0": file_size},
        environment={},
        alone=True,
    )


def _start(folder: Path, arguments: tuple[object, ...], **job: object) -> Running:
    job |= {"folder": str(folder), "arguments": [str(argument) for argument in arguments]}
    server = _server()
    server.stdin.write(json.dumps(job) + "\n")
    server.stdin.flush()
    return Running(server, folder, json.loads(server.stdout.readline()))


@functools.cache
def _server() -> subprocess.Popen:
    plain = {name: value for name, value in os.environ.items() if name not in WORLD and not name.startswith("SLURM")}
    ours = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.support.rank_server"],
        cwd=ROOT,
        env=plain | ours,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    atexit.register(server.kill)
    return server
