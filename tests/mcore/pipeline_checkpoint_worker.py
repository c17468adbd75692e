"""Two steps with a checkpoint between them: `save` does both, `load` resumes from the checkpoint of another layout."""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from megatron_paint.config.megatron import MegatronSettings
from megatron_paint.losses import InterpolationLossConfig
from megatron_paint.losses.objectives import DistillationLoss
from megatron_paint.mcore.ranks import start_ranks, stop_ranks
from tests.mcore import parity_cases as parity
from tests.mcore.checkpoint_worker import make_policy
from tests.mcore.layouts import PIPELINES, Layout, layout_of
from tests.mcore.parity_worker import records

CASES = (
    parity.Case(
        name="full", tied=True, teacher="ema", optimizer="adam", distributed_optimizer=True, overlap_grad_reduce=True
    ),
    parity.Case(name="lora", tied=False, teacher="ema", optimizer="adam", lora=True, ema_anchor=0.3),
)


def cases_at(layout: Layout) -> tuple[parity.Case, ...]:
    """A stage without layers has no adapters to train, and groups of replicas need a distributed optimiser."""
    return CASES[:1] if layout == PIPELINES["pp4-ends"] or layout.instances > 1 else CASES


def main() -> None:
    layout, part, layers = layout_of(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    checkpoints, saved, out = (Path(path) for path in sys.argv[4:7])
    torch.set_num_threads(1)
    ranks = start_ranks(MegatronSettings(**layout.megatron))
    losses = {}
    for case in (replace(case, layers=layers) for case in cases_at(layout)):
        if part == "load" and not (saved / case.name).exists():
            continue
        policy = make_policy(case, checkpoints, layout, ranks)
        loss = DistillationLoss(config=InterpolationLossConfig(**parity.LOSS), chunk_bytes=4e3, token_temperature=1.1)
        if part == "save":
            policy.update(records(0, case), loss, lr=case.lr)
            policy.save(saved / case.name, {"step": 1})
            policy.finish_save(wait=True)
        else:
            assert policy.load(saved / case.name)["step"] == 1
        report = policy.update(records(1, case), loss, lr=case.lr)
        losses[case.name] = [*(score.loss_sum for score in report.scores), report.grad_norm]
        policy.export(out / case.name)
    if ranks.rank == 0:
        torch.save(losses, out / "losses.pt")
    stop_ranks()


if __name__ == "__main__":
    main()
