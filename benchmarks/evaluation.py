"""Measures sampling and grading of an evaluation against the usual way, in one run.

    python benchmarks/evaluation.py [--responses rollouts.jsonl] [--rounds 5]

Sampling: a Qwen3 of 15 million random weights answers prompts of different lengths in batches, with the project's own
generator and with `transformers.generate` (its cache, left padding, the same batch, sampling at temperature 1). Both
stop at the same number of tokens. The rounds alternate, and the figure is the median of the ratios. Grading: recorded
responses ({"rollout", "answer"}; generated ones without a file) are graded by the pool of worker processes, and by
math-verify in this process without a time limit.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch
from random_model import make_model

from megatron_paint.config.megatron import MegatronSettings
from megatron_paint.config.settings import DataSettings, ModelSettings, RolloutSettings, RunSettings
from megatron_paint.grading.boxes import last_box
from megatron_paint.grading.grade import GradingPool
from megatron_paint.mcore.ranks import start_ranks, stop_ranks
from megatron_paint.models.qwen3.shape import read_shape
from megatron_paint.rollouts.engine import GenerationRequest, SamplingParameters

VOCABULARY, NEVER = 4096, 4095  # NEVER is the stop id of both; it is never sampled


def measure_sampling(rounds: int, *, rows: int, tokens: int) -> None:
    from transformers import Qwen3ForCausalLM

    generator = random.Random(0)
    prompts = [[generator.randrange(NEVER) for _ in range(generator.randint(20, 120))] for _ in range(rows)]
    with tempfile.TemporaryDirectory() as folder:
        make_model(folder, vocabulary=VOCABULARY, layers=4)
        megatron = MegatronSettings(use_distributed_optimizer=False)
        ranks = start_ranks(megatron)
        from megatron_paint.mcore.runner import ModelRunner

        runner = ModelRunner(
            read_shape(folder),
            ranks,
            model=ModelSettings(hf_path=folder, dtype="float32"),
            megatron=megatron,
            rollout=RolloutSettings(batch_size=rows),
            micro_batch_tokens=DataSettings.micro_batch_tokens,
            seed=RunSettings.seed,
        )
        theirs = Qwen3ForCausalLM.from_pretrained(folder).eval()
    sampling = SamplingParameters(
        max_new_tokens=tokens, temperature=1.0, top_p=1.0, top_k=0, stop_ids=frozenset({NEVER})
    )
    requests = [
        GenerationRequest(problem_id=str(i), sample_index=0, prompt_ids=tuple(prompt), key=i)
        for i, prompt in enumerate(prompts)
    ]
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])

    def ours() -> int:
        return sum(len(rollout.response_ids) for rollout in runner.sampler.generate(requests, sampling))

    def others() -> int:
        with torch.no_grad():
            made = theirs.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                eos_token_id=NEVER,
                pad_token_id=0,
            )
        return rows * (made.shape[1] - longest)

    seconds: dict[str, list[float]] = {"ours": [], "transformers": []}
    for number in range(rounds + 1):
        for name, act in (("ours", ours), ("transformers", others)):
            start = time.perf_counter()
            count = act()
            if number:  # the first is warm-up
                seconds[name].append((time.perf_counter() - start) / count)
    ratios = [theirs_ / ours_ for ours_, theirs_ in zip(seconds["ours"], seconds["transformers"], strict=True)]
    rates = ", ".join(f"{name} {1 / statistics.median(each):,.0f} tokens/s" for name, each in seconds.items())
    print(f"sampling {rows} x {tokens} tokens: {statistics.median(ratios):.2f} x transformers.generate ({rates})")
    stop_ranks()


def measure_grading(file: Path | None, rounds: int) -> None:
    from math_verify import parse, verify

    if file is None:
        pairs = [(f"So it is $\\boxed{{\\frac{{{i}}}{{{i + 7}}}}}$.", f"{i}/{i + 7}") for i in range(400)]
    else:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        pairs = [(row["rollout"], row["answer"]) for row in rows]
    seconds: dict[str, list[float]] = {"pool": [], "math-verify": []}
    with GradingPool() as pool:
        pool.grade(pairs[:8])  # starts the workers

        def alone() -> None:
            for text, answer in pairs:
                boxed = f"$\\boxed{{{last_box(text) or ''}}}$"
                gold, given = (parse(latex, parsing_timeout=None) for latex in (f"${answer}$", boxed))
                verify(gold, given, timeout_seconds=None)

        for _ in range(rounds):
            for name, act in (("pool", lambda: pool.grade(pairs)), ("math-verify", alone)):
                start = time.perf_counter()
                act()
                seconds[name].append(time.perf_counter() - start)
    ratio = statistics.median(b / a for a, b in zip(seconds["pool"], seconds["math-verify"], strict=True))
    rate = len(pairs) / statistics.median(seconds["pool"])
    print(f"grading {len(pairs)} responses: {ratio:.1f} x math-verify in one process ({rate:,.0f} a second)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--responses", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    measure_grading(options.responses, options.rounds)
    for rows, tokens in ((16, 64), (64, 64)):
        measure_sampling(options.rounds, rows=rows, tokens=tokens)


if __name__ == "__main__":
    main()
