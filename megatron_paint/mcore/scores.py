"""What the loss saw, sample by sample: sums that travel between ranks as plain numbers.

Axes: N response tokens of a micro-batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_paint.losses import LossOutput
from megatron_paint.mcore.batch import MicroBatch
from megatron_paint.records import Sample, SampleScore


@dataclass(frozen=True, kw_only=True, slots=True)
class NonFinite:
    """Where a loss was not a number; printed in the error that stops the step."""

    rank: int
    micro_batch: int
    problem_id: str

    def __str__(self) -> str:
        return f"loss is not finite on rank {self.rank}, micro-batch {self.micro_batch}, problem {self.problem_id!r}"


def score_samples(
    output: LossOutput, batch: MicroBatch, samples: Sequence[Sample], *, rank: int, keep_logprobs: bool
) -> dict[int, SampleScore | NonFinite]:
    """Scores of the micro-batch's samples by their index in the step."""
    on_host = {
        name: getattr(output, f"{name}_T").detach().cpu().split(batch.lengths)
        for name in (
            "loss",
            "student_entropy",
            "teacher_entropy",
            "selected",
            "divergence",
            "clipped_share",
            "clipped_entries",
            "carries_loss",
        )
    }
    logps = output.token_logp_T.detach().cpu().split(batch.lengths) if output.token_logp_T is not None else None
    scores: dict[int, SampleScore | NonFinite] = {}
    for place, index in enumerate(batch.indices):
        part = {name: rows[place] for name, rows in on_host.items()}
        sample = samples[index]
        if not torch.isfinite(part["loss"]).all():
            scores[index] = NonFinite(rank=rank, micro_batch=batch.number, problem_id=sample.problem.id)
            continue
        gap = None
        if logps is not None and sample.rollout is not None and sample.rollout.logprobs is not None:
            gap = float((logps[place] - torch.tensor(sample.rollout.logprobs)).abs().max())
        selected, carries = part["selected"], part["carries_loss"]
        scores[index] = SampleScore(
            loss_sum=float(part["loss"].double().sum()),
            num_tokens=len(selected),
            loss_tokens=int(carries.sum()),
            student_entropy_sum=float(part["student_entropy"].double().sum()),
            teacher_entropy_sum=float(part["teacher_entropy"].double().sum()),
            selected=tuple(selected.nonzero()[:, 0].tolist()),
            divergence_selected_sum=float(part["divergence"][selected].double().sum()),
            divergence_other_sum=float(part["divergence"][~selected].double().sum()),
            clipped_mass_sum=float(part["clipped_share"][carries].double().sum()),
            clipped_entries=int(part["clipped_entries"][carries].sum()),
            token_logprobs=tuple(logps[place].tolist()) if keep_logprobs else None,
            sampler_gap_max=gap,
        )
    return scores
