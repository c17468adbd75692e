"""At one layout: runs that start from PEFT adapters, as the start of their own adapters or merged into the weights."""

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
from tests.mcore.layouts import layout_of
from tests.mcore.parity_worker import records, settings_of

CASE = parity.Case(name="continued", tied=False, teacher="initial", optimizer="adam", lora=True)
LORA = LoraSettings(rank=4, alpha=6.0, export="adapter")


def sequences() -> list[ScoredSequence]:
    return [ScoredSequence(prompt_ids=s.student_prompt_ids, response_ids=s.response_ids) for s in records(0, CASE)]


def main() -> None:
    layout, (models, adapters, saved, out) = layout_of(sys.argv[1]), map(Path, sys.argv[2:6])
    torch.set_num_threads(1)
    ranks = start_ranks(MegatronSettings(**layout.megatron))
    loss = DistillationLoss(config=InterpolationLossConfig(**parity.LOSS), chunk_bytes=4e3, token_temperature=1.1)
    settings = settings_of(CASE, models, layout.megatron)
    shape = read_shape(settings.model.hf_path)

    def policy_from(adapter: Path, lora: LoraSettings | None) -> MegatronPolicy:
        model = replace(settings.model, adapter_path=str(adapter), lora=lora)
        return MegatronPolicy(replace(settings, model=model), shape, ranks)

    found = {}
    policy = policy_from(adapters / "all", LORA)
    found["notes"] = policy.notes
    policy.export(out / "start")
    found["start"] = policy.logprobs(sequences(), weights="current")
    for _ in range(2):
        policy.update(records(0, CASE), loss, lr=CASE.lr)
    found["trained"] = policy.logprobs(sequences(), weights="current")
    found["teacher"] = policy.logprobs(sequences(), weights="teacher")
    policy.export(out / "trained")
    policy.save(out / "checkpoint", {"step": 2})
    policy.finish_save(wait=True)
    if saved.exists():  # of the other layout
        policy = policy_from(adapters / "all", LORA)
        policy.load(saved)
        found["loaded teacher"] = policy.logprobs(sequences(), weights="teacher")
        found["loaded"] = policy.logprobs(sequences(), weights="current")
    policy = policy_from(adapters / "some", LORA)
    found["some notes"] = policy.notes
    found["some"] = policy.logprobs(sequences(), weights="current")
    policy = policy_from(adapters / "dora", None)
    found["dora notes"] = policy.notes
    found["dora"] = policy.logprobs(sequences(), weights="teacher")
    policy.export(out / "dora")
    if ranks.rank == 0:
        torch.save(found, out / "found.pt")
    stop_ranks()


if __name__ == "__main__":
    main()
