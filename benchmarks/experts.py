"""Measures a training step of a mixture of experts on two ranks: each has all experts, or half of them.

    python benchmarks/experts.py [--rows 16] [--tokens 128] [--rounds 5] [--cores 0,1]

A Qwen3-MoE of 4 layers, hidden size 256 and 16 experts of which a token uses 4, with random float32 weights; SFT on
--rows sequences of --tokens tokens with AdamW. Each rank has one core and one thread, and half of the sequences. With
EP 2 the tokens travel to their experts, and a rank's optimiser has half of the experts. Everything is in alternating
rounds; the figures are medians.
"""

import tempfile
from typing import TextIO

from step_ranks import VOCABULARY, Ranks, answer_steps, compare, options_of, random_rows


def work_on(work: dict, answers: TextIO) -> None:
    """One rank."""
    tokens = work["tokens"]
    rows = random_rows(work["rows"], tokens=tokens + 1, response=tokens + 1 - tokens // 2)
    megatron = {"expert_model_parallel_size": work["experts"]}
    answer_steps(work["model"], rows, answers, micro_batch_tokens=4 * tokens, megatron=megatron)


def make_model(folder: str, *, tokens: int) -> None:
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
    options = options_of(__doc__, work_on, rows=16, tokens=128, rounds=5)
    if options is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        make_model(folder, tokens=options.tokens)
        work = {"model": folder, "rows": options.rows, "tokens": options.tokens}
        cores = options.cores.split(",")
        kinds = {f"EP {n}": Ranks(__file__, work | {"experts": n}, ranks=2, cores=cores) for n in (1, 2)}
        compare(kinds, rounds=options.rounds)


if __name__ == "__main__":
    main()
