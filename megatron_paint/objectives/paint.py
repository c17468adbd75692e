"""PAINT, one step from problems to update (arXiv 2604.26573); OPSD (arXiv 2601.18734) is its special case.

The student samples one response per problem. The more of the reference a response reproduces, the more of the reference
is hidden from the teacher, which is the same network. The teacher re-scores the response; the student moves towards the
teacher's distribution, mixed with its own where their entropies differ most. OPSD: everything shown, nothing mixed.
"""

import dataclasses
import time
from collections.abc import Sequence

from megatron_paint.config.settings import Settings
from megatron_paint.data.prompts import Prompts
from megatron_paint.losses.elementwise.choose import loss_kernel
from megatron_paint.losses.objectives import DistillationLoss
from megatron_paint.masker.overlap import MaskerPool
from megatron_paint.masker.reveal import limit_hidden, reveal_step
from megatron_paint.objectives.metrics import metrics_of
from megatron_paint.policy import Policy, ScoredSequence
from megatron_paint.records import Problem, Reveal, Rollout, Sample, StepReport
from megatron_paint.rollouts.source import RolloutSource
from megatron_paint.runtime.rank_zero import OnRankZero, directly


class Paint:
    """The objective of `objective.name: paint` and `opsd`."""

    def __init__(
        self,
        settings: Settings,
        prompts: Prompts,
        *,
        pool: MaskerPool | None = None,
        on_rank_zero: OnRankZero = directly,
    ):
        """on_rank_zero: runs a function on rank 0 and returns its result on all ranks; `pool` exists on rank 0."""
        self.settings = settings
        self.prompts = prompts
        self.pool = pool
        self.on_rank_zero = on_rank_zero
        self.source = RolloutSource(settings, prompts)
        # Greedy log-probabilities are taken at temperature 1.
        self.loss = DistillationLoss(
            config=settings.objective.loss,
            chunk_bytes=settings.objective.chunk_bytes,
            kernel=loss_kernel(settings.objective.kernel),
            token_temperature=settings.rollout.temperature or 1.0,
        )

    def step(self, policy: Policy, problems: Sequence[Problem], *, step: int, lr: float) -> StepReport:
        """Samples, masks, scores and updates once."""
        started = time.perf_counter()
        rollouts = self.source.rollouts(policy, problems, step=step)
        sampled = time.perf_counter()
        samples = self.samples(problems, rollouts, step=step)
        masked = time.perf_counter()
        samples = self.limited(policy, samples)
        limited = time.perf_counter()
        update = policy.update(samples, self.loss, lr=lr)
        seconds = {"rollout": sampled - started, "mask": masked - sampled, **update.seconds}
        seconds["teacher"] += limited - masked
        metrics = metrics_of(
            step=step,
            samples=samples,
            scores=update.scores,
            grad_norm=update.grad_norm,
            lr=lr,
            seconds={**seconds, "step": time.perf_counter() - started},
        )
        return StepReport(step=step, metrics=metrics, samples=tuple(samples), scores=update.scores)

    def samples(self, problems: Sequence[Problem], rollouts: Sequence[Rollout], *, step: int) -> list[Sample]:
        """Each rollout with the prompts of both sides: the teacher's shows what the masker reveals."""
        keys = [self.source.key(problem, step) for problem in problems]
        reveals = self.on_rank_zero(
            lambda: reveal_step(
                problems,
                [self.prompts.response_text(rollout.response_ids) for rollout in rollouts],
                settings=self.settings.objective.reveal,
                keys=keys,
                token_offsets=self.prompts.solution_offsets,
                pool=self.pool,
            )
        )
        return [self._sample(*row) for row in zip(problems, rollouts, reveals, keys, strict=True)]

    def limited(self, policy: Policy, samples: list[Sample]) -> list[Sample]:
        """The samples with no more hidden than `objective.reveal.hidden_nats` allows, by the teacher's own judgement.

        Where it is set, the teacher scores the references of which something is hidden: one more pass without gradient.
        """
        settings = self.settings.objective.reveal
        if settings.hidden_nats is None:
            return samples
        partly = [index for index, s in enumerate(samples) if s.reveal.shown_tokens < s.reveal.total_tokens]
        references = [
            ScoredSequence(
                prompt_ids=samples[index].teacher_prompt_ids,
                response_ids=self.prompts.solution_ids(samples[index].reveal.reference),
            )
            for index in partly
        ]
        found = list(samples)
        scored = policy.logprobs(references, weights="teacher") if partly else []
        for index, logprobs in zip(partly, scored, strict=True):
            sample = samples[index]
            offsets = self.prompts.solution_offsets(sample.reveal.reference)
            surprise = [-logprob for logprob in logprobs]
            reveal = limit_hidden(sample.reveal, surprise, settings=settings, offsets=offsets)
            prompt = self.prompts.teacher_prompt(sample.problem, reveal)
            found[index] = dataclasses.replace(sample, reveal=reveal, teacher_prompt_ids=prompt)
        return found

    def _sample(self, problem: Problem, rollout: Rollout, reveal: Reveal, key: int) -> Sample:
        full = self.prompts.full_teacher_prompt(problem, reveal) if self.loss.needs_full_teacher else None
        return Sample(
            problem=problem,
            key=key,
            rollout=rollout,
            teacher_prompt_ids=self.prompts.teacher_prompt(problem, reveal),
            full_teacher_prompt_ids=full,
            reveal=reveal,
        )
