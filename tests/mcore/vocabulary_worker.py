"""At one layout: samples, scores, trains and saves a model whose vocabulary tensor parallelism does not divide.

`first` starts from the model and saves after one step; `rest` resumes from what another layout has saved.
"""

import dataclasses
import json
import sys
from pathlib import Path

import torch

from megatron_paint.config.megatron import MegatronSettings
from megatron_paint.losses import InterpolationLossConfig
from megatron_paint.losses.objectives import DistillationLoss
from megatron_paint.mcore.policy import MegatronPolicy
from megatron_paint.mcore.ranks import start_ranks, stop_ranks
from megatron_paint.models.qwen3.shape import read_shape
from megatron_paint.policy import ScoredSequence
from megatron_paint.records import Sample
from tests.mcore import parity_cases as parity
from tests.mcore.generation_cases import SAMPLING, requests
from tests.mcore.parity_worker import records, settings_of

CASES = (
    parity.Case(name="untied", tied=False, teacher="initial", optimizer="adam", weight_decay=0.3, clip_grad=0.5),
    parity.Case(name="tied", tied=True, teacher="ema", optimizer="adam", weight_decay=0.3, distributed_optimizer=True),
)


def within(ids: tuple[int, ...], vocab_size: int) -> tuple[int, ...]:
    return tuple(token % vocab_size for token in ids)


def samples_of(step: int, case: parity.Case, vocab_size: int) -> list[Sample]:
    """The samples of a parity case, with ids of a smaller vocabulary."""
    found = []
    for sample in records(step, case):
        rollout = dataclasses.replace(
            sample.rollout,
            prompt_ids=within(sample.rollout.prompt_ids, vocab_size),
            response_ids=within(sample.rollout.response_ids, vocab_size),
        )
        teacher = within(sample.teacher_prompt_ids, vocab_size)
        found.append(dataclasses.replace(sample, rollout=rollout, teacher_prompt_ids=teacher))
    return found


def sequences_of(case: parity.Case, vocab_size: int) -> list[ScoredSequence]:
    samples = samples_of(0, case, vocab_size)
    return [ScoredSequence(prompt_ids=s.student_prompt_ids, response_ids=s.response_ids) for s in samples]


def main() -> None:
    layout, part = json.loads(sys.argv[1]), sys.argv[2]
    models, saved, out = (Path(path) for path in sys.argv[3:6])
    torch.set_num_threads(1)
    ranks = start_ranks(MegatronSettings(**layout))
    loss = DistillationLoss(config=InterpolationLossConfig(**parity.LOSS), chunk_bytes=4e3, token_temperature=1.1)
    result = {}
    for case in CASES:
        settings = settings_of(case, models, layout)
        shape = read_shape(settings.model.hf_path)
        policy = MegatronPolicy(settings, shape, ranks)
        found = result[case.name] = {"losses": [], "norms": []}
        if part == "first":
            policy.export(out / f"{case.name}-unchanged")
            found["logprobs"] = policy.logprobs(sequences_of(case, shape.vocab_size), weights="current")
            asked = [dataclasses.replace(r, prompt_ids=within(r.prompt_ids, shape.vocab_size)) for r in requests()]
            found["rollouts"] = {n: policy.sampler.generate(asked, SAMPLING[n]) for n in ("greedy", "plain", "top-k")}
        else:
            assert policy.load(saved / case.name)["step"] == 1
        for step in (0, 1) if part == "first" else (1,):
            report = policy.update(samples_of(step, case, shape.vocab_size), loss, lr=case.lr)
            found["losses"].append([score.loss_sum for score in report.scores])
            found["norms"].append(report.grad_norm)
            if step == 0:
                policy.save(out / case.name, {"step": 1})
                policy.finish_save(wait=True)
        policy.export(out / f"{case.name}-trained")
        if part == "rest":
            start = dataclasses.replace(settings.model, megatron_path=str(saved / case.name))
            warm = MegatronPolicy(dataclasses.replace(settings, model=start), shape, ranks, trained=False)
            warm.export(out / f"{case.name}-warm")
    if ranks.rank == 0:
        torch.save(result, out / "result.pt")
    stop_ranks()


if __name__ == "__main__":
    main()
