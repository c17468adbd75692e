"""Measures a training step of a mixture of experts on two ranks: each has all experts, or half of them.

    python benchmarks/experts.py [--rows 16] [--tokens 128] [--rounds 5] [--cores 0,1]

A Qwen3-MoE of 4 layers, hidden size 256 and 16 experts of which a token uses 4, with random float32 weights; SFT on
--rows sequences of --tokens tokens with AdamW. Each rank has one core and one thread, and half of the sequences. With
EP 2 the tokens travel to their experts, and a rank's optimiser has half of the experts. Everything is in alternating
rounds; the figures are medians.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from context import Ranks, compare

VOCABULARY = 4096


def work_on(answers) -> None:
    """One rank: the first line of standard input describes the work, each further line asks for a step."""
    work = json.loads(sys.stdin.readline())
    import time

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
            "model": {"hf_path": work["model"], "dtype": "float32"},
            "data": {"train": "none", "micro_batch_tokens": 4 * work["tokens"]},
            "objective": {"name": "sft"},
            "megatron": {"expert_model_parallel_size": work["experts"]},
            "run": {"dir": "none"},
        }
    )
    ranks = start_ranks(settings.megatron)
    policy = MegatronPolicy(settings, read_shape(work["model"]), ranks)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(VOCABULARY, (work["rows"], work["tokens"] + 1), generator=generator).tolist()
    half = work["tokens"] // 2
    samples = [
        Sample(
            problem=Problem(id=str(i), problem="", solution="", answer=""),
            key=i,
            rollout=Rollout(problem_id=str(i), prompt_ids=tuple(row[:half]), response_ids=tuple(row[half:])),
        )
        for i, row in enumerate(rows)
    ]
    print("ready", file=answers, flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        policy.update(samples, CrossEntropyLoss(chunk_bytes=1e9), lr=1e-6)
        print(time.perf_counter() - start, file=answers, flush=True)
    stop_ranks()


def make_model(folder: Path, *, tokens: int) -> None:
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        moe_intermediate_size=192,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=tokens + 1,
        tie_word_embeddings=True,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"rows": 16, "tokens": 128, "rounds": 5}.items():
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
        work = {"model": folder, "rows": options.rows, "tokens": options.tokens}
        here = {"cores": options.cores.split(","), "script": Path(__file__).resolve()}
        compare(
            {f"EP {n}": Ranks(work | {"experts": n}, ranks=2, **here) for n in (1, 2)},
            rounds=options.rounds,
        )


if __name__ == "__main__":
    main()
