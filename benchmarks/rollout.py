"""Measures sampling with several engines in one run, on the same model and prompts, in alternating rounds.

    python benchmarks/rollout.py [--old FOLDER] [--engines product,old,transformers] [--spread 6,0.3] [--rounds 3]
        [--rows 64] [--tokens 32] [--top-p 0.95] [--top-k 0] [--temperature 1] [--threads 2]

The models are Qwen3s of 42 million random weights with the real vocabulary, float32. A model's logits are normally
distributed; `--spread` lists standard deviations. At 6, a nucleus of 0.95 has tens of tokens, as that of a trained
model. At 0.3, it has most of the vocabulary.

* `product`: this checkout, with the model in this process.
* `old`: another checkout of this project with the interface of commit 868de36, in a process of its own. It draws the
  same tokens, and the benchmark checks it.
* `transformers`: `transformers.generate`, with left padding, its cache and its own random numbers.

No engine may stop early, so all make the same number of tokens. The figures are the best of the rounds: tokens a second
of wall time, and CPU seconds of the engine's process. A thread that waits uses CPU time too, so CPU seconds of a busy
machine are comparable with `--threads 1` only.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from random_model import make_full_vocabulary_model

HERE = Path(__file__).resolve().parent
NEVER = 151_935  # the only stop id, and no prompt has it


@dataclass(frozen=True, kw_only=True)
class Work:
    """What every engine samples."""

    model: str  # a Hugging Face folder
    prompts: list[list[int]]
    tokens: int
    temperature: float
    top_p: float
    top_k: int
    threads: int


@dataclass(frozen=True, kw_only=True)
class Timed:
    """One round of an engine."""

    seconds: float
    cpu_seconds: float
    responses: list[list[int]]


Sample = Callable[[], Timed]


@contextmanager
def product(work: Work, options: argparse.Namespace) -> Iterator[Sample]:
    """This checkout's sampler."""
    from megatron_paint.config.megatron import MegatronSettings
    from megatron_paint.config.settings import DataSettings, ModelSettings, RolloutSettings, RunSettings
    from megatron_paint.mcore.ranks import start_ranks, stop_ranks
    from megatron_paint.models.qwen3.shape import read_shape
    from megatron_paint.rollouts.engine import GenerationRequest, SamplingParameters

    megatron = MegatronSettings(use_distributed_optimizer=False)
    ranks = start_ranks(megatron)
    from megatron_paint.mcore.runner import ModelRunner

    runner = ModelRunner(
        read_shape(work.model),
        ranks,
        model=ModelSettings(hf_path=work.model, dtype="float32"),
        megatron=megatron,
        rollout=RolloutSettings(batch_size=len(work.prompts)),
        micro_batch_tokens=DataSettings.micro_batch_tokens,
        seed=RunSettings.seed,
    )
    sampling = SamplingParameters(
        max_new_tokens=work.tokens,
        temperature=work.temperature,
        top_p=work.top_p,
        top_k=work.top_k,
        stop_ids=frozenset({NEVER}),
    )
    requests = [
        GenerationRequest(problem_id=str(i), sample_index=0, prompt_ids=tuple(prompt), key=i)
        for i, prompt in enumerate(work.prompts)
    ]
    yield lambda: timed(lambda: [list(made.response_ids) for made in runner.sampler.generate(requests, sampling)])
    stop_ranks()


@contextmanager
def old(work: Work, options: argparse.Namespace) -> Iterator[Sample]:
    """The sampler of the checkout `--old`, in its own process."""
    environment = os.environ | {"PYTHONPATH": str(options.old.resolve())}
    process = subprocess.Popen(
        [sys.executable, str(HERE / "rollout_old.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=work.model,  # else the checkout that holds the benchmark could be imported
    )

    def ask(line: str) -> str:
        print(line, file=process.stdin, flush=True)
        answer = process.stdout.readline()
        if not answer:
            raise SystemExit(f"the sampler of {options.old} ended with status {process.wait()}")
        return answer

    ask(json.dumps(asdict(work)))
    yield lambda: Timed(**json.loads(ask("sample")))
    process.stdin.close()
    process.wait()


@contextmanager
def transformers(work: Work, options: argparse.Namespace) -> Iterator[Sample]:
    """`transformers.generate` with its own key-value cache."""
    from transformers import Qwen3ForCausalLM

    model = Qwen3ForCausalLM.from_pretrained(work.model).eval()
    longest = max(map(len, work.prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in work.prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in work.prompts])
    drawing = {"do_sample": False}
    if work.temperature:
        drawing = {"do_sample": True, "temperature": work.temperature, "top_p": work.top_p, "top_k": work.top_k}

    @torch.no_grad()
    def generate() -> list[list[int]]:
        made = model.generate(
            input_ids=ids,
            attention_mask=mask,
            **drawing,
            max_new_tokens=work.tokens,
            min_new_tokens=work.tokens,
            eos_token_id=NEVER,
            pad_token_id=0,
        )
        return made[:, longest:].tolist()

    yield lambda: timed(generate)


# An engine loads the model, yields a function that samples everything once, and then frees what it holds.
ENGINES: dict[str, Callable[[Work, argparse.Namespace], AbstractContextManager[Sample]]] = {
    "product": product,
    "old": old,
    "transformers": transformers,
}


def timed(act: Callable[[], list[list[int]]]) -> Timed:
    start, cpu_start = time.perf_counter(), time.process_time()
    responses = act()
    return Timed(seconds=time.perf_counter() - start, cpu_seconds=time.process_time() - cpu_start, responses=responses)


def compare(work: Work, options: argparse.Namespace) -> None:
    """Prints a line for each engine."""
    rounds: dict[str, list[Timed]] = {name: [] for name in options.engines}
    with ExitStack() as stack:
        engines = {name: stack.enter_context(ENGINES[name](work, options)) for name in options.engines}
        torch.set_num_threads(work.threads)
        for number in range(options.rounds + 1):
            for name, sample in engines.items():
                found = sample()
                check(found, work, name)
                if number:  # the first round is warm-up
                    rounds[name].append(found)
    if {"product", "old"} <= rounds.keys():
        same = rounds["product"][0].responses == rounds["old"][0].responses
        print(f"the tokens of product and old are {'the same' if same else 'NOT the same'}")
    print("| engine | tokens/s | CPU s | product is faster by, wall time | CPU time |\n|---|---:|---:|---:|---:|")
    count = len(work.prompts) * work.tokens
    ours = rounds.get("product", [])
    for name, found in rounds.items():
        seconds, cpu_seconds = best(found)
        ratios = (
            [f"{other / own:.2f}" for other, own in zip(best(found), best(ours), strict=True)] if ours else ["", ""]
        )
        print(f"| {name} | {count / seconds:,.1f} | {cpu_seconds:.1f} | {' | '.join(ratios)} |", flush=True)


def best(found: list[Timed]) -> tuple[float, float]:
    return min(each.seconds for each in found), min(each.cpu_seconds for each in found)


def check(found: Timed, work: Work, name: str) -> None:
    """SystemExit: an engine stopped early, and its time is not comparable."""
    short = [len(response) for response in found.responses if len(response) != work.tokens]
    if short or len(found.responses) != len(work.prompts):
        raise SystemExit(f"{name} returned {len(found.responses)} responses; lengths not {work.tokens}: {short}")


def nucleus_size(model: str, work: Work) -> float:
    """The mean number of tokens that top-p keeps after the prompts."""
    from transformers import Qwen3ForCausalLM

    reference = Qwen3ForCausalLM.from_pretrained(model).eval()
    sizes = []
    for prompt in work.prompts[:16]:
        with torch.no_grad():
            logits_V = reference(input_ids=torch.tensor([prompt])).logits[0, -1].double()
        p_V = (logits_V / (work.temperature or 1.0)).softmax(-1).sort(descending=True).values
        sizes.append(int((p_V.cumsum(0) - p_V < work.top_p).sum()))
    return sum(sizes) / len(sizes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", type=Path, help="a checkout of commit 868de36; without it, no engine `old`")
    parser.add_argument("--engines", type=lambda text: text.split(","), default=list(ENGINES))
    parser.add_argument("--spread", type=lambda text: [float(part) for part in text.split(",")], default=[6.0, 0.3])
    counts = {"rounds": 3, "rows": 64, "tokens": 32, "top-k": 0, "threads": torch.get_num_threads()}
    for name, default in counts.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("top-p", 0.95), ("temperature", 1.0)):
        parser.add_argument(f"--{name}", type=float, default=default)
    options = parser.parse_args()
    if unknown := set(options.engines) - ENGINES.keys():
        parser.error(f"--engines: {', '.join(sorted(unknown))}; known are {', '.join(ENGINES)}")
    options.engines = [name for name in options.engines if name != "old" or options.old]
    generator = random.Random(0)
    prompts = [[generator.randrange(NEVER) for _ in range(generator.randint(20, 120))] for _ in range(options.rows)]
    for spread in options.spread:
        with tempfile.TemporaryDirectory() as folder:
            make_full_vocabulary_model(folder, spread=spread)
            work = Work(
                model=folder,
                prompts=prompts,
                tokens=options.tokens,
                temperature=options.temperature,
                top_p=options.top_p,
                top_k=options.top_k,
                threads=options.threads,
            )
            print(
                f"\n{options.rows} rows x {options.tokens} tokens, temperature {options.temperature:g}, top_p "
                f"{options.top_p:g}, top_k {options.top_k}, logits with deviation {spread:g}: top-p keeps "
                f"{nucleus_size(folder, work):,.0f} tokens; {options.threads} threads, float32"
            )
            compare(work, options)


if __name__ == "__main__":
    main()
