"""Runs the parity cases of a mixture of experts at one layout. Rank 0 writes what came out."""

import sys
from pathlib import Path

import torch

from megatron_paint.config.megatron import MegatronSettings
from megatron_paint.mcore import hf_checkpoint
from megatron_paint.mcore.ranks import start_ranks, stop_ranks
from tests.mcore.expert_cases import CASES, fits
from tests.mcore.layouts import EXPERT_LAYOUTS
from tests.mcore.parity_worker import run_case


def main() -> None:
    layout, folder, out = EXPERT_LAYOUTS[sys.argv[1]], Path(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    hf_checkpoint.WRITER_BYTES = 10_000  # the ranks share the writing even of these models
    ranks = start_ranks(MegatronSettings(**layout.megatron))
    for case in CASES:
        if fits(case, layout):
            run_case(case, folder, out, ranks, layout.megatron)
    stop_ranks()


if __name__ == "__main__":
    main()
