"""Measures a training step of one long row on two context-parallel ranks against the same step on one rank.

    python benchmarks/context.py [--tokens 4096] [--response 256] [--rounds 5] [--cores 0,1]

A Qwen3 of 8 layers and hidden size 512 with random float32 weights; SFT on one sequence of --tokens tokens. Each rank
has one core and one thread. `zig-zag`: the pieces that this package gives a rank. `contiguous`: neighbouring pieces,
which give the last rank more work of causal attention. Everything is in alternating rounds; the figures are medians.
"""

import tempfile
from typing import TextIO

from random_model import make_model
from step_ranks import VOCABULARY, Ranks, answer_steps, compare, options_of, random_rows

KINDS = {"one rank": (1, "zig-zag"), "zig-zag": (2, "zig-zag"), "contiguous": (2, "contiguous")}


def work_on(work: dict, answers: TextIO) -> None:
    """One rank."""
    from megatron_paint.mcore import context

    if work["pieces"] == "contiguous":
        context.pieces_of = lambda rank, size: (2 * rank, 2 * rank + 1)
    rows = random_rows(1, tokens=work["tokens"] + 1, response=work["response"])
    megatron = {"context_parallel_size": work["ranks"]}
    answer_steps(work["model"], rows, answers, micro_batch_tokens=work["tokens"], megatron=megatron)


def main() -> None:
    options = options_of(__doc__, work_on, tokens=4096, response=256, rounds=5)
    if options is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        make_model(folder, vocabulary=VOCABULARY, layers=8, positions=options.tokens + 1)
        work = {"model": folder, "tokens": options.tokens, "response": options.response}
        cores = options.cores.split(",")
        kinds = {
            name: Ranks(__file__, work | {"pieces": pieces}, ranks=ranks, cores=cores)
            for name, (ranks, pieces) in KINDS.items()
        }
        compare(kinds, rounds=options.rounds)


if __name__ == "__main__":
    main()
