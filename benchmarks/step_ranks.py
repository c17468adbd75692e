"""Benchmarks of a training step on ranks: processes, each on one core, that wait for a line before each step."""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parents[1]
VOCABULARY = 4096
Row = tuple[list[int], list[int]]  # token ids of a prompt and its response


class Ranks:
    """The processes of one kind; they wait for a line before each step."""

    def __init__(self, script: str, work: dict, *, ranks: int, cores: list[str]) -> None:
        """script: what each rank runs, with --worker: a command with `options_of`, whose work is that of this kind."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        self.processes = []
        for rank in range(ranks):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
            path = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
            self.processes.append(
                subprocess.Popen(
                    ["taskset", "--cpu-list", cores[rank], sys.executable, script, "--worker"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    env=os.environ | {key: str(value) for key, value in place.items()} | {"PYTHONPATH": path},
                )
            )
        self.ask(json.dumps(work | {"ranks": ranks}))

    def ask(self, line: str) -> list[str]:
        """The answers of all ranks. SystemExit: a rank has ended."""
        for process in self.processes:
            print(line, file=process.stdin, flush=True)
        answers = [process.stdout.readline() for process in self.processes]
        if not all(answers):
            raise SystemExit("a rank has ended; what it printed is above")
        return answers

    def step(self) -> float:
        """Seconds of the slowest rank."""
        return max(float(answer) for answer in self.ask("step"))

    def end(self) -> None:
        for process in self.processes:
            process.stdin.close()
        for process in self.processes:
            process.wait()


def options_of(description: str, work_on: Callable[[dict, TextIO], None], **defaults: int) -> argparse.Namespace | None:
    """The options of the command line; None in a rank, whose work is done then.

    work_on: does the work that the first line of standard input describes, with `answer_steps`. It also gets the stream
    of the answers, because what the program prints is no answer.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--cores", default="0,1")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        answers, sys.stdout = sys.stdout, sys.stderr
        work_on(json.loads(sys.stdin.readline()), answers)
        return None
    return options


def random_rows(count: int, *, tokens: int, response: int) -> list[Row]:
    """Rows of random token ids. response: tokens at the end of a row that carry loss."""
    import torch

    ids = torch.randint(VOCABULARY, (count, tokens), generator=torch.Generator().manual_seed(0)).tolist()
    return [(row[:-response], row[-response:]) for row in ids]


def answer_steps(
    model: str, rows: Sequence[Row], answers: TextIO, *, micro_batch_tokens: int, megatron: dict[str, Any]
) -> None:
    """Trains on the rows once for each line of standard input, and answers with the seconds."""
    import torch

    from megatron_paint.config.load import settings_of
    from megatron_paint.losses.objectives import CrossEntropyLoss
    from megatron_paint.mcore.policy import MegatronPolicy
    from megatron_paint.mcore.ranks import start_ranks, stop_ranks
    from megatron_paint.models.qwen3.shape import read_shape
    from megatron_paint.records import Problem, Rollout, Sample

    torch.set_num_threads(1)
    settings = settings_of(
        {
            "model": {"hf_path": model, "dtype": "float32"},
            "data": {"train": "none", "micro_batch_tokens": micro_batch_tokens},
            "objective": {"name": "sft"},
            "megatron": megatron,
            "run": {"dir": "none"},
        }
    )
    ranks = start_ranks(settings.megatron)
    policy = MegatronPolicy(settings, read_shape(model), ranks)
    samples = [
        Sample(
            problem=Problem(id=str(key), problem="", solution="", answer=""),
            key=key,
            rollout=Rollout(problem_id=str(key), prompt_ids=tuple(prompt), response_ids=tuple(response)),
        )
        for key, (prompt, response) in enumerate(rows)
    ]
    print("ready", file=answers, flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        policy.update(samples, CrossEntropyLoss(chunk_bytes=1e9), lr=1e-6)
        print(time.perf_counter() - start, file=answers, flush=True)
    stop_ranks()


def compare(kinds: dict[str, Ranks], *, rounds: int) -> None:
    """Prints the median seconds of a step of each kind, in alternating rounds, and their ratio to the first kind."""
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for number in range(rounds + 1):
        for name, ranks in kinds.items():
            took = ranks.step()
            times[name] += [took] if number else []  # the first round is warm-up
    for ranks in kinds.values():
        ranks.end()
    first = next(iter(times))
    print(f"| | s a step | / {first} |\n|---|---:|---:|")
    for name, found in times.items():
        median = statistics.median(found)
        print(f"| {name} | {median:.2f} | {median / statistics.median(times[first]):.2f} |")
