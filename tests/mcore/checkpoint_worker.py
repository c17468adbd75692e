"""Trains, saves, loads: `all` runs 2N steps, `first` N steps and a checkpoint, `rest` resumes from it, `warm` takes its
weights alone for the start of another run."""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from megatron_paint.base.errors import UserError
from megatron_paint.config.megatron import MegatronSettings
from megatron_paint.losses import InterpolationLossConfig
from megatron_paint.losses.objectives import DistillationLoss
from megatron_paint.mcore.policy import MegatronPolicy
from megatron_paint.mcore.ranks import start_ranks, stop_ranks
from megatron_paint.models.qwen3.shape import read_shape
from tests.mcore import parity_cases as parity
from tests.mcore.layouts import LAYOUTS
from tests.mcore.parity_worker import records, set_adapters, settings_of

HALF = 2
CASES = (
    parity.Case(
        name="full-initial", tied=False, teacher="initial", optimizer="adam", distributed_optimizer=True, eps=1e-8
    ),
    parity.Case(name="full-ema-tied", tied=True, teacher="ema", optimizer="adam", distributed_optimizer=True, eps=1e-8),
    parity.Case(name="lora-ema", tied=True, teacher="ema", optimizer="adam", lora=True, eps=1e-8, ema_anchor=0.3),
    parity.Case(
        name="full-ema-support",  # the checkpoint also holds the initial weights, which decide the support
        tied=False,
        teacher="ema",
        optimizer="adam",
        eps=1e-8,
        lr=2e-2,
        loss={"support": "initial", "support_ratio": 0.3, "token_weight": "divergence"},
    ),
    parity.Case(name="bfloat16", tied=True, teacher="ema", optimizer="adam", distributed_optimizer=True, eps=1e-8),
)


def make_policy(case: parity.Case, checkpoints: Path, layout, ranks) -> MegatronPolicy:
    settings = settings_of(case, checkpoints, layout.megatron)
    if case.name == "bfloat16":
        settings = replace(settings, model=replace(settings.model, dtype="bfloat16"))
    policy = MegatronPolicy(settings, read_shape(settings.model.hf_path), ranks)
    set_adapters(policy)
    policy.optimizer.reload_model_params()
    return policy


def start_warm(checkpoints: Path, saved: Path, out: Path, layout, ranks) -> None:
    """Exports models that start from checkpoints of runs; a LoRA run's, whose adapters would be lost, is refused."""
    for case in (CASES[0], CASES[1]):
        settings = settings_of(case, checkpoints, layout.megatron)
        settings = replace(settings, model=replace(settings.model, megatron_path=str(saved / case.name)))
        MegatronPolicy(settings, read_shape(settings.model.hf_path), ranks).export(out / case.name)
    settings = settings_of(CASES[2], checkpoints, layout.megatron)
    settings = replace(settings, model=replace(settings.model, megatron_path=str(saved / CASES[2].name)))
    try:
        MegatronPolicy(settings, read_shape(settings.model.hf_path), ranks)
    except UserError as error:
        (out / f"refused{ranks.rank}").write_text(str(error))


def main() -> None:
    layout, part = LAYOUTS[sys.argv[1]], sys.argv[2]
    checkpoints, saved, out = (Path(path) for path in sys.argv[3:6])
    torch.set_num_threads(1)
    ranks = start_ranks(MegatronSettings(**layout.megatron))
    if part == "warm":
        start_warm(checkpoints, saved, out, layout, ranks)
        return stop_ranks()
    losses = {}
    for case in CASES:
        policy = make_policy(case, checkpoints, layout, ranks)
        config = InterpolationLossConfig(**case.loss_settings)
        loss = DistillationLoss(config=config, chunk_bytes=4e3, token_temperature=1.1)
        start = 0
        if part == "rest":
            start = policy.load(saved / case.name)["step"]
            assert start == HALF
        steps = range(start, HALF if part == "first" else 2 * HALF)
        losses[case.name] = [
            [score.loss_sum for score in policy.update(records(step, case), loss, lr=case.lr).scores] for step in steps
        ]
        if part == "first":
            policy.save(saved / case.name, {"step": HALF})
            policy.finish_save(wait=True)
        policy.export(out / case.name)
    if ranks.rank == 0:
        torch.save(losses, out / "losses.pt")
    stop_ranks()


if __name__ == "__main__":
    main()
