"""What the loss measured in each sample, as plain numbers that ranks can exchange.

Axes: N response tokens of a micro-batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from megatron_paint.losses import LossOutput
from megatron_paint.mcore.batch import MicroBatch
from megatron_paint.records import LikelyTokens, Sample, SamplerGap, SampleScore

NOTICED = 0.1  # nats: tokens above it are counted


@dataclass(frozen=True, kw_only=True, slots=True)
class NonFinite:
    """Where a loss was not finite; the error that stops the step prints it."""

    rank: int
    micro_batch: int
    problem_id: str

    def __str__(self) -> str:
        return f"loss is not finite on rank {self.rank}, micro-batch {self.micro_batch}, problem {self.problem_id!r}"


def score_samples(
    output: LossOutput,
    batch: MicroBatch,
    samples: Sequence[Sample],
    *,
    rank: int,
    keep_logprobs: bool,
    kept: int = 0,
    likely: Mapping[int, dict[str, LikelyTokens]] | None = None,
) -> dict[int, SampleScore | NonFinite]:
    """Scores of the micro-batch's samples by their index in the step; samples: those of the step.

    kept: how many samples of the step, the first ones, keep the values of their tokens. likely: by index of the sample.
    """

    def by_sample(values_N: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return values_N.detach().cpu().split(batch.lengths)

    losses, carries, selected = map(by_sample, (output.loss_T, output.carries_loss_T, output.selected_T))
    sums = {name: by_sample(values_N) for name, values_N in output.sums.items()}
    per_token = {name: by_sample(values_N) for name, values_N in output.per_token.items()}
    keeps = any(index < kept for index in batch.indices)
    of_kept = {name: by_sample(values_N) for name, values_N in output.kept.items()} if keeps else {}
    logps = None if output.token_logp_T is None else by_sample(output.token_logp_T)
    scores: dict[int, SampleScore | NonFinite] = {}
    for place, index in enumerate(batch.indices):
        sample = samples[index]
        if not torch.isfinite(losses[place]).all():
            scores[index] = NonFinite(rank=rank, micro_batch=batch.number, problem_id=sample.problem.id)
            continue
        gap, named = None, dict(per_token)
        if index < kept:
            named |= of_kept
        values = {name: tuple(parts[place].tolist()) for name, parts in named.items()}
        if logps is not None and sample.rollout.logprobs is not None and not sample.rollout.is_behind:
            gap_N = logps[place] - torch.tensor(sample.rollout.logprobs)
            gap = _gap(gap_N.abs())
            if index < kept:
                values["logprob_gap"] = tuple(gap_N.tolist())
        scores[index] = SampleScore(
            loss_sum=_sum(losses[place]),
            num_tokens=len(losses[place]),
            loss_tokens=int(carries[place].sum()),
            selected=tuple(selected[place].nonzero()[:, 0].tolist()),
            sums={name: _sum(parts[place]) for name, parts in sums.items()},
            per_token=values,
            likely=(likely or {}).get(index, {}),
            token_logprobs=tuple(logps[place].tolist()) if keep_logprobs else None,
            sampler_gap=gap,
        )
    return scores


def _gap(gap_N: torch.Tensor) -> SamplerGap:
    return SamplerGap(
        largest=float(gap_N.max()),
        position=int(gap_N.argmax()),
        total=_sum(gap_N),
        above=int((gap_N > NOTICED).sum()),
    )


def _sum(values_N: torch.Tensor) -> float:
    return float(values_N.double().sum())
