"""Measures vLLM's servers as a rollout engine: sampling, updates of their weights, and sampling one step ahead.

    python benchmarks/transfer.py sampling --vllm PYTHON [--rounds 3] [--rows 64] [--tokens 128] [--threads 1]
    python benchmarks/transfer.py update --vllm PYTHON [--rounds 3] [--layers 21] [--message-mb 16,32,64,256]
    python benchmarks/transfer.py share --vllm PYTHON [--layers 21] [--problems 16] [--tokens 128] [--cores 0,1]
    python benchmarks/transfer.py ahead --vllm PYTHON [--rounds 3] [--layers 21] [--steps 8] [--problems 4]

PYTHON is that of an environment with vLLM and this package (docs/vllm.md). Everything is in float32.

* `sampling`: tokens a second through one server and HTTP, against vLLM's own `LLM.generate`, on the same prompts. The
  model has 42 million random weights and the real vocabulary. The prefix caches are emptied before each round.
* `update`: an update of one server's weights, against a copy of the model's file to /dev/shm. At 21 layers the model
  has 300 MB.
* `share`: the share of a step of PAINT on this model that the update takes.
* `ahead`: steps a second with `rollout.ahead` 1 and 0. The trainer and the server have one core each. The ratio is
  largest if sampling and training take equal time: choose --problems, of a step, so that they do.

The engines of a comparison alternate in one run. The figures are the medians of the rounds: seconds of wall time, and
CPU seconds of all processes that take part. On a busy machine only CPU seconds are comparable.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from random_model import make_full_vocabulary_model, make_model

from megatron_paint.config.vllm import VllmSettings
from megatron_paint.models.qwen3.shape import read_shape
from megatron_paint.rollouts.engine import GenerationRequest, SamplingParameters
from megatron_paint.rollouts.vllm.command import ServerOptions
from megatron_paint.rollouts.vllm.file_transfer import FileTransfer
from megatron_paint.rollouts.vllm.fleet import Fleet
from megatron_paint.rollouts.vllm.sampler import VllmSampler
from megatron_paint.runtime.guard import members_of
from megatron_paint.runtime.rank_zero import directly

HERE = Path(__file__).resolve().parent
QUICKSTART = HERE.parent / "examples" / "quickstart"
MEMORY = Path("/dev/shm")
NEVER = 151_935  # no prompt has it
SMALL_VOCABULARY = 16_384


def server_of(python: str) -> list[str]:
    return [python, "-m", "vllm.entrypoints.openai.api_server"]


@contextmanager
def running_fleet(model: Path, options: argparse.Namespace, *, vocabulary: int) -> Iterator[Fleet]:
    """One server that loads the model; it may not be ready yet."""
    settings = VllmSettings(command=tuple(server_of(options.vllm)), environment=environment(options))
    engine = ServerOptions(settings=settings, dtype="float32", logprobs_mode="raw_logprobs", on_gpus=False)
    fleet = Fleet(engine, vocab_size=vocabulary, logs=model.parent / "logs", note=print)
    try:
        fleet.start(model)
        yield fleet
    finally:
        fleet.close()


def environment(options: argparse.Namespace) -> dict[str, str]:
    return {"VLLM_CPU_KVCACHE_SPACE": "2", "OMP_NUM_THREADS": str(options.threads)}


def sampling(options: argparse.Namespace, folder: Path) -> None:
    """Prints tokens a second of both engines."""
    model = folder / "model"
    make_full_vocabulary_model(str(model), spread=6)
    draw = random.Random(0)
    prompts = [[draw.randrange(NEVER) for _ in range(draw.randint(20, 120))] for _ in range(options.rows)]
    with (
        running_fleet(model, options, vocabulary=NEVER + 1) as fleet,
        offline(model, prompts, options) as offline_round,
    ):
        fleet.wait_until_ready()
        sampler = sampler_of(fleet, model)
        plain = SamplingParameters(
            max_new_tokens=options.tokens, temperature=1.0, top_p=1.0, top_k=0, stop_ids=frozenset()
        )
        requests = [
            GenerationRequest(problem_id=str(i), sample_index=0, prompt_ids=tuple(prompt), key=i)
            for i, prompt in enumerate(prompts)
        ]

        def ours() -> list[list[int]]:
            return [list(rollout.response_ids) for rollout in sampler.generate(requests, plain)]

        times: dict[str, list[Timed]] = {"ours": [], "offline": []}
        for number in range(options.rounds + 1):
            fleet.call_each(fleet._forget_prefixes, "a round")
            found = {"ours": timed(ours, group_of(fleet)), "offline": offline_round()}
            for name, one in found.items():
                assert [len(response) for response in one.result] == [options.tokens] * options.rows
                times[name] += [one] if number else []  # the first round is warm-up
    same = found["ours"].result == found["offline"].result
    print(f"the tokens are {'the same' if same else 'not the same'}")
    print_times(times, unit="tokens/s", work=options.rows * options.tokens)


@contextmanager
def offline(model: Path, prompts: list, options: argparse.Namespace) -> Iterator[Callable[[], "Timed"]]:
    """vLLM's `LLM.generate` in a separate process."""
    log = model.parent / "offline.log"
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    process = subprocess.Popen(
        [options.vllm, str(HERE / "transfer_offline.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log.open("wb"),
        text=True,
        start_new_session=True,
        env=inherited | environment(options) | {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"},
    )

    def ask(line: str) -> str:
        print(line, file=process.stdin, flush=True)
        answer = process.stdout.readline()
        if not answer:
            raise SystemExit(f"vLLM ended:\n{log.read_text()[-3000:]}")
        return answer

    def one_round() -> Timed:
        before = cpu_seconds(process.pid)
        found = json.loads(ask("sample"))
        return Timed(found["seconds"], cpu_seconds(process.pid) - before, found["responses"])

    ask(json.dumps({"model": str(model), "prompts": prompts, "tokens": options.tokens}))
    yield one_round
    process.stdin.close()
    process.wait()


def sampler_of(fleet: Fleet, model: Path, **how) -> VllmSampler:
    """weights, transfer: for updates."""
    return VllmSampler(
        fleet,
        **{"weights": None, "transfer": None, **how},
        spot_check=None,
        start_model=model,
        exports=model.parent / "exports",
        on_rank_zero=directly,
    )


def update(options: argparse.Namespace, folder: Path) -> None:
    """Prints the seconds of an update and of a copy, and the update's share of a step."""
    import torch

    from megatron_paint.config.settings import DataSettings, ModelSettings, RunSettings, Settings
    from megatron_paint.mcore.ranks import start_ranks, stop_ranks

    model = folder / "model"
    make_model(str(model), vocabulary=SMALL_VOCABULARY, layers=options.layers)
    settings = Settings(
        model=ModelSettings(hf_path=str(model), dtype="float32"),
        data=DataSettings(train="none"),
        run=RunSettings(dir="none"),
    )
    with running_fleet(model, options, vocabulary=SMALL_VOCABULARY) as fleet:
        ranks = start_ranks(settings.megatron)
        from megatron_paint.mcore.policy import MegatronPolicy
        from megatron_paint.mcore.weight_source import StageWeights

        policy = MegatronPolicy(settings, read_shape(model), ranks)
        samplers = {}
        for size in options.message_mb:
            weights = StageWeights(policy.stage, policy.shape, ranks, settings.model)
            transfer = FileTransfer(
                weights,
                rank=0,
                message_bytes=size * 1_000_000,
                folder=MEMORY / f"{folder.name}-{size}",
                in_memory=True,
                on_rank_zero=directly,
                everyone=lambda act: [act()],
            )
            samplers[f"update, messages of {size} MB"] = sampler_of(fleet, model, weights=weights, transfer=transfer)
        fleet.wait_until_ready(transfer.init_info)
        torch.set_num_threads(options.threads)
        times: dict[str, list[Timed]] = {**{name: [] for name in samplers}, "copy": []}
        for number in range(options.rounds + 1):
            found = {
                name: timed(lambda: sampler.sync_weights(number + 1), group_of(fleet))  # noqa: B023 - called at once
                for name, sampler in samplers.items()
            }
            for name, one in (found | {"copy": copy(model)}).items():
                times[name] += [one] if number else []
        for sampler in samplers.values():
            sampler.transfer.close()
        assert not fleet.failed
        stop_ranks()
    size = (model / "model.safetensors").stat().st_size / 1e6
    print(f"model of {size:.0f} MB")
    print_times(times, unit="MB/s", work=size)


def share(options: argparse.Namespace, folder: Path) -> None:
    """Prints the update's share of some steps."""
    model = folder / "model"
    make_model(str(model), vocabulary=SMALL_VOCABULARY, layers=options.layers)
    metrics = train(model, folder / "run", options, "run.steps=3", f"rollout.max_new_tokens={options.tokens}")
    for line in metrics:
        took = step_seconds(line, options)
        part = line["rollout/update_seconds"] / took
        print(f"step {line['step']}: {took:.1f} s, of which the update takes {part:.3f}")


def copy(model: Path) -> "Timed":
    """A copy of the model's file to memory that is new."""
    target = MEMORY / f"{model.parent.name}.copy"
    found = timed(lambda: shutil.copyfile(model / "model.safetensors", target))
    target.unlink()
    return found


@dataclass(frozen=True)
class Timed:
    """One round: seconds of wall time, and CPU seconds of this process and the other engine's."""

    seconds: float
    cpu_seconds: float
    result: Any = None


def timed(act: Callable[[], Any], *groups: int) -> Timed:
    """groups: the process groups that take part besides this process."""

    def cpu() -> float:
        return time.process_time() + sum(map(cpu_seconds, groups))

    start, cpu_start = time.perf_counter(), cpu()
    result = act()
    return Timed(time.perf_counter() - start, cpu() - cpu_start, result)


def cpu_seconds(group: int) -> float:
    """Of all processes of a group."""
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in members_of(group)]
    return sum(int(each[11]) + int(each[12]) for each in fields) / os.sysconf("SC_CLK_TCK")


def group_of(fleet: Fleet) -> int:
    """The process group of the only server: that of the only child of its guard."""
    guard = fleet.live[0].process._process.pid
    (child,) = Path(f"/proc/{guard}/task/{guard}/children").read_text().split()
    return os.getpgid(int(child))


def ahead(options: argparse.Namespace, folder: Path) -> None:
    """Prints the seconds of a step with `rollout.ahead` 0 and 1; trainer and server have one core each."""
    model = folder / "model"
    make_model(str(model), vocabulary=SMALL_VOCABULARY, layers=options.layers)
    times: dict[str, list[Timed]] = {"ahead: 1": [], "ahead: 0": []}
    shares = []
    for number in range(options.rounds):
        for name in times:
            metrics = train(
                model,
                folder / f"run-{number}-{name[-1]}",
                options,
                f"rollout.ahead={name[-1]}",
                f"run.steps={options.steps}",
                f"rollout.max_new_tokens={options.tokens}",
            )
            steps = metrics[2:]  # the first step is warm-up; in it and in the last one nothing is done ahead
            times[name] += [Timed(step_seconds(line, options), float("nan")) for line in steps[:-1]]
            if name == "ahead: 0":
                shares += [line["time/rollout_s"] / step_seconds(line, options) for line in steps[:-1]]
    print(f"sampling takes {statistics.median(shares):.2f} of a step with ahead: 0")
    print_times(times, unit="steps/s", work=1)


def train(model: Path, run: Path, options: argparse.Namespace, *overrides: str) -> list[dict]:
    """The metrics of a run of PAINT with one server on the problems of the quickstart."""
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(QUICKSTART / "model" / name, model / name)
    trainer, server = options.cores.split(",")
    pinned = ["taskset", "--cpu-list"]
    command = [
        *(*pinned, trainer, sys.executable, "-m", "megatron_paint", "train", "examples/quickstart/paint.yaml"),
        *("--processes", "1", "--quiet", f"model.hf_path={model}", f"run.dir={run}", "run.evaluate_every=0"),
        *("megatron.tensor_model_parallel_size=1", "megatron.pipeline_model_parallel_size=1"),
        *("megatron.sequence_parallel=false", "evaluation.problems=null", f"data.problems_per_step={options.problems}"),
        *("run.resume=never", "run.save_every=0", "optimizer.lr=1e-5", "rollout.engine=vllm"),
        f"rollout.vllm.command={json.dumps([*pinned, server, *server_of(options.vllm)])}",
        f"rollout.vllm.environment={json.dumps(environment(options))}",
        *overrides,
    ]
    path = f"{HERE.parent}:{os.environ.get('PYTHONPATH', '')}"
    subprocess.run(command, cwd=HERE.parent, env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, check=True)
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def step_seconds(line: dict, options: argparse.Namespace) -> float:
    return options.problems * line["response/length_mean"] / line["tokens_per_second"]


def print_times(times: dict[str, list[Timed]], *, unit: str, work: float) -> None:
    """A line for each engine. A ratio is its time to that of the last line."""
    print(f"| | seconds | {unit} | / last line | CPU seconds | / last line |\n|---|---:|---:|---:|---:|---:|")
    medians = {
        name: [
            statistics.median(values) for values in zip(*((one.seconds, one.cpu_seconds) for one in found), strict=True)
        ]
        for name, found in times.items()
    }
    last, cpu_last = list(medians.values())[-1]
    for name, (wall, cpu) in medians.items():
        print(f"| {name} | {wall:.2f} | {work / wall:.3g} | {wall / last:.2f} | {cpu:.2f} | {cpu / cpu_last:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["sampling", "update", "share", "ahead"])
    parser.add_argument("--vllm", required=True, help="the Python of vLLM's environment")
    counts = {"rounds": 3, "rows": 64, "tokens": 128, "threads": 1, "layers": 21, "steps": 8, "problems": 16}
    for name, default in counts.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    sizes = [16, 32, 64, 256]
    parser.add_argument("--message-mb", type=lambda text: [int(part) for part in text.split(",")], default=sizes)
    parser.add_argument("--cores", default="0,1", help="of the trainer and of the server, in runs")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        {"sampling": sampling, "update": update, "share": share, "ahead": ahead}[options.what](options, Path(folder))


if __name__ == "__main__":
    main()
