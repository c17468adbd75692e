"""Measures a training step of one long row on two context-parallel ranks against the same step on one rank.

    python benchmarks/context.py [--tokens 4096] [--response 256] [--rounds 5] [--cores 0,1]

A Qwen3 of 8 layers and hidden size 512 with random float32 weights; SFT on one sequence of --tokens tokens. Each rank
has one core and one thread. `zig-zag`: the pieces that this package gives a rank. `contiguous`: neighbouring pieces,
which give the last rank more work of causal attention. Everything is in alternating rounds; the figures are medians.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve()
VOCABULARY = 4096
KINDS = {"one rank": (1, "zig-zag"), "zig-zag": (2, "zig-zag"), "contiguous": (2, "contiguous")}


class Ranks:
    """The processes of one kind; they wait for a line before each step."""

    def __init__(self, work: dict, *, ranks: int, cores: list[str], script: Path = HERE) -> None:
        """script: what each rank runs, with --worker; it answers each line on standard input with one line."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        self.processes = []
        for rank in range(ranks):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
            path = f"{HERE.parents[1]}:{os.environ.get('PYTHONPATH', '')}"
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


def work_on(answers) -> None:
    """One rank: the first line of standard input describes the work, each further line asks for a step."""
    work = json.loads(sys.stdin.readline())
    import time

    import torch

    from megatron_paint.config.load import settings_of
    from megatron_paint.losses.objectives import CrossEntropyLoss
    from megatron_paint.mcore import context
    from megatron_paint.mcore.policy import MegatronPolicy
    from megatron_paint.mcore.ranks import start_ranks, stop_ranks
    from megatron_paint.models.qwen3.shape import read_shape
    from megatron_paint.records import Problem, Rollout, Sample

    if work["pieces"] == "contiguous":
        context.pieces_of = lambda rank, size: (2 * rank, 2 * rank + 1)
    torch.set_num_threads(1)
    settings = settings_of(
        {
            "model": {"hf_path": work["model"], "dtype": "float32"},
            "data": {"train": "none", "micro_batch_tokens": work["tokens"]},
            "objective": {"name": "sft"},
            "megatron": {"context_parallel_size": work["ranks"]},
            "run": {"dir": "none"},
        }
    )
    ranks = start_ranks(settings.megatron)
    policy = MegatronPolicy(settings, read_shape(work["model"]), ranks)
    ids = torch.randint(VOCABULARY, (work["tokens"] + 1,), generator=torch.Generator().manual_seed(0)).tolist()
    prompt, response = tuple(ids[: -work["response"]]), tuple(ids[-work["response"] :])
    sample = Sample(
        problem=Problem(id="0", problem="", solution="", answer=""),
        key=0,
        rollout=Rollout(problem_id="0", prompt_ids=prompt, response_ids=response),
    )
    print("ready", file=answers, flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        policy.update([sample], CrossEntropyLoss(chunk_bytes=1e9), lr=1e-6)
        print(time.perf_counter() - start, file=answers, flush=True)
    stop_ranks()


def make_model(folder: Path, *, tokens: int) -> None:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=tokens + 1,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"tokens": 4096, "response": 256, "rounds": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--cores", default="0,1")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        answers, sys.stdout = sys.stdout, sys.stderr
        work_on(answers)
        return
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder), tokens=options.tokens)
        work = {"model": folder, "tokens": options.tokens, "response": options.response}
        cores = options.cores.split(",")
        kinds = {n: Ranks(work | {"pieces": pieces}, ranks=r, cores=cores) for n, (r, pieces) in KINDS.items()}
        compare(kinds, rounds=options.rounds)


if __name__ == "__main__":
    main()
