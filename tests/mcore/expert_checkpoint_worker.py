"""At one layout: saves runs of a mixture of experts after a step, or loads what other layouts saved; then a step."""

import sys
from pathlib import Path

import torch

from megatron_paint.config.megatron import MegatronSettings
from megatron_paint.losses import InterpolationLossConfig
from megatron_paint.losses.objectives import DistillationLoss
from megatron_paint.mcore.policy import MegatronPolicy
from megatron_paint.mcore.ranks import start_ranks, stop_ranks
from megatron_paint.models.qwen3.shape import read_shape
from tests.mcore import parity_cases as parity
from tests.mcore.expert_cases import fits
from tests.mcore.layouts import EXPERT_LAYOUTS
from tests.mcore.parity_worker import records, set_adapters, settings_of

COMMON = {"experts": True, "optimizer": "adam", "eps": 1e-4, "teacher": "ema"}
CASES = (
    parity.Case(name="full-distributed", tied=True, distributed_optimizer=True, **COMMON),
    parity.Case(name="full-plain", tied=False, **COMMON),
    parity.Case(name="lora-experts", tied=False, lora=True, adapts_experts=True, distributed_optimizer=True, **COMMON),
)


def step(policy: MegatronPolicy, number: int, case: parity.Case) -> dict:
    loss = DistillationLoss(config=InterpolationLossConfig(**parity.LOSS), chunk_bytes=4e3, token_temperature=1.1)
    report = policy.update(records(number, case), loss, lr=case.lr)
    return {"losses": [score.loss_sum for score in report.scores], "norm": report.grad_norm}


def main() -> None:
    """LAYOUT CHECKPOINTS SAVED OUT LAYOUTS...: without LAYOUTS it saves its own, else it loads theirs."""
    name, checkpoints, saved, out = sys.argv[1], *map(Path, sys.argv[2:5])
    layout = EXPERT_LAYOUTS[name]
    torch.set_num_threads(1)
    ranks = start_ranks(MegatronSettings(**layout.megatron))
    for case in CASES:
        for writer in sys.argv[5:] or (None,):
            if not fits(case, layout) or (writer is not None and not fits(case, EXPERT_LAYOUTS[writer])):
                continue
            settings = settings_of(case, checkpoints, layout.megatron)
            policy = MegatronPolicy(settings, read_shape(settings.model.hf_path), ranks)
            if writer is None:
                set_adapters(policy)
                policy.optimizer.reload_model_params()
                step(policy, 0, case)
                policy.save(saved / name / case.name, {"step": 1})
                policy.finish_save(wait=True)
            else:
                assert policy.load(saved / writer / case.name)["step"] == 1
            found = step(policy, 1, case)
            stem = f"{case.name}-{writer or 'unbroken'}"
            policy.export(out / stem)
            if ranks.rank == 0:
                torch.save(found, out / f"{stem}.pt")
    stop_ranks()


if __name__ == "__main__":
    main()
