"""One update without a limit on the gradient's norm, with a limit just above the norm, and with one just below it."""

import dataclasses
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_paint.config.megatron import MegatronSettings
from megatron_paint.losses import InterpolationLossConfig
from megatron_paint.losses.objectives import DistillationLoss
from megatron_paint.mcore.policy import MegatronPolicy
from megatron_paint.mcore.ranks import start_ranks, stop_ranks
from megatron_paint.models.qwen3.shape import read_shape
from tests.mcore import parity_cases as parity
from tests.mcore.layouts import layout_of
from tests.mcore.parity_worker import records, same, settings_of, state_of

CASE = parity.BY_NAME["full-tied-ema-adam"]  # which also clips


def main() -> None:
    layout, folder, out = layout_of(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    ranks = start_ranks(MegatronSettings(**layout.megatron))
    loss = DistillationLoss(config=InterpolationLossConfig(**parity.LOSS), chunk_bytes=4e3, token_temperature=1.1)

    def policy_with(limit: float | None) -> MegatronPolicy:
        settings = settings_of(CASE, folder, layout.megatron)
        optimizer = dataclasses.replace(settings.optimizer, grad_norm_skip_threshold=limit)
        settings = dataclasses.replace(settings, optimizer=optimizer)
        return MegatronPolicy(settings, read_shape(settings.model.hf_path), ranks)

    free = policy_with(None)
    norm = free.update(records(0, CASE), loss, lr=CASE.lr).grad_norm
    above, below = policy_with(1.001 * norm), policy_with(0.999 * norm)
    found = {"norm": norm, "norm above": above.update(records(0, CASE), loss, lr=CASE.lr).grad_norm}
    found["above is free"] = same(state_of(above), state_of(free))
    before, found["told"] = state_of(below), ""
    try:
        below.update(records(0, CASE), loss, lr=CASE.lr)
    except FloatingPointError as error:
        found["told"] = str(error)
    found["below stays"] = same(state_of(below), before)
    found["free moves"] = not same(state_of(free), before)
    everyone = [None] * ranks.size
    dist.all_gather_object(everyone, found, group=ranks.host_group)
    if ranks.rank == 0:
        torch.save(everyone, out)
    stop_ranks()


if __name__ == "__main__":
    main()
