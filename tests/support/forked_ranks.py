"""Short runs of several ranks: one process imports everything once and forks the ranks of each."""

import atexit
import functools
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.support.ports import free_port

ROOT = Path(__file__).parents[2]
COMMAND = "megatron_paint.__main__:run"


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

    @property
    def message(self) -> str:
        """The one line that every rank ended with, after an error of the user's."""
        lines = {line for text in self.err for line in text.splitlines()}
        assert self.statuses == [2] * len(self.statuses), self
        assert len(lines) == 1, self
        (line,) = lines
        assert line.startswith("megatron-paint: error: "), self
        return line


def run(
    folder: Path,
    *arguments: object,
    target: str = COMMAND,
    processes: int = 2,
    limit: float = 400.0,
    kill: Kill | None = None,
    file_size: dict[int, int] | None = None,
) -> Ended:
    """Calls `target`, which finds the arguments in `sys.argv`, in so many ranks; fails where they hang.

    folder: for their output. limit: seconds. file_size: most bytes of a file that a rank may write.
    """
    job = {
        "folder": str(folder),
        "arguments": [str(argument) for argument in arguments],
        "target": target,
        "processes": processes,
        "port": free_port(),
        "limit": limit,
        "kill": None if kill is None else {"below": str(kill.below), "event": kill.event, "delay": kill.delay},
        "file_size": {str(rank): size for rank, size in (file_size or {}).items()},
    }
    server = _server()
    server.stdin.write(json.dumps(job) + "\n")
    server.stdin.flush()
    answer = json.loads(server.stdout.readline())
    out, err = ([(folder / f"{name}{rank}").read_text() for rank in range(processes)] for name in ("out", "err"))
    assert not answer["hung"], (answer, out, err)
    return Ended(answer["statuses"], out, err)


def train(folder: Path, settings: Path, *overrides: str, **how: object) -> Ended:
    """`megatron-paint train SETTINGS key=value ... --json` in two ranks."""
    return run(folder, "train", settings, *overrides, "--json", **how)


@functools.cache
def _server() -> subprocess.Popen:
    environment = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.support.rank_server"],
        cwd=ROOT,
        env=os.environ | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    atexit.register(server.kill)
    return server
