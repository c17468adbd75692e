"""At one layout: a run of adapters on the experts of a mixture that starts from PEFT's, exports and converts them."""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from megatron_paint.config.megatron import MegatronSettings
from megatron_paint.config.settings import LoraSettings
from megatron_paint.losses import InterpolationLossConfig
from megatron_paint.losses.objectives import DistillationLoss
from megatron_paint.mcore.policy import MegatronPolicy
from megatron_paint.mcore.ranks import start_ranks, stop_ranks
from megatron_paint.models.qwen3.shape import read_shape
from megatron_paint.policy import ScoredSequence
from tests.mcore import parity_cases as parity
from tests.mcore.layouts import EXPERT_LAYOUTS
from tests.mcore.parity_worker import records, settings_of

CASE = parity.Case(
    name="continued",
    experts=True,
    tied=False,
    teacher="initial",
    optimizer="adam",
    lora=True,
    adapts_experts=True,
)
LORA = LoraSettings(rank=4, alpha=6.0, experts=True, export="adapter")


def sequences() -> list[ScoredSequence]:
    return [ScoredSequence(prompt_ids=s.student_prompt_ids, response_ids=s.response_ids) for s in records(0, CASE)]


def main() -> None:
    layout, (models, adapter, out) = EXPERT_LAYOUTS[sys.argv[1]], map(Path, sys.argv[2:5])
    torch.set_num_threads(1)
    ranks = start_ranks(MegatronSettings(**layout.megatron))
    loss = DistillationLoss(config=InterpolationLossConfig(**parity.LOSS), chunk_bytes=4e3, token_temperature=1.1)
    settings = settings_of(CASE, models, layout.megatron)
    settings = replace(settings, model=replace(settings.model, adapter_path=str(adapter), lora=LORA))
    policy = MegatronPolicy(settings, read_shape(settings.model.hf_path), ranks)
    found = {"notes": policy.notes, "start": policy.logprobs(sequences(), weights="current")}
    policy.export(out / "start")
    policy.update(records(0, CASE), loss, lr=CASE.lr)
    found["trained"] = policy.logprobs(sequences(), weights="current")
    policy.export(out / "trained")
    state = {"step": 1, "settings": {"model": {"lora": {"rank": LORA.rank, "alpha": LORA.alpha}}}}
    policy.save(out / "checkpoint", state)
    policy.finish_save(wait=True)
    if ranks.rank == 0:
        torch.save(found, out / "found.pt")
    stop_ranks()


if __name__ == "__main__":
    main()
