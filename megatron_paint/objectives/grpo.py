"""GRPO, one step from problems to updates (arXiv 2402.03300): a verified answer is worth 1, any other 0.

The student samples a group of responses per problem. A response's advantage is how far its reward lies above its
group's mean, in standard deviations; each of its tokens is made more likely by it, within a clipped ratio. A group
whose rewards are all equal teaches nothing and is left out.
"""

import dataclasses
import statistics
import time
from collections.abc import Sequence

from megatron_paint.config.settings import Settings
from megatron_paint.data.prompts import Prompts
from megatron_paint.grading.grade import Grade, GradingPool
from megatron_paint.losses.elementwise.choose import loss_kernel
from megatron_paint.losses.objectives import PolicyGradientLoss
from megatron_paint.objectives.metrics import mean_of, metrics_of, ratio
from megatron_paint.policy import Policy
from megatron_paint.records import Problem, Rollout, Sample, SampleScore, StepReport, UpdateReport
from megatron_paint.rollouts.source import RolloutSource
from megatron_paint.runtime.rank_zero import OnRankZero, directly

EPSILON = 1e-6  # added to a group's standard deviation


def advantages(rewards: Sequence[float]) -> list[float]:
    """(r - mean) / (std + 1e-6) of one group, the standard deviation with n - 1; exactly 0 where all are equal."""
    mean, deviation = statistics.fmean(rewards), statistics.stdev(rewards)
    return [(reward - mean) / (deviation + EPSILON) if deviation else 0.0 for reward in rewards]


class Grpo:
    """The objective of `objective.name: grpo`."""

    def __init__(
        self,
        settings: Settings,
        prompts: Prompts,
        *,
        graders: GradingPool | None = None,
        on_rank_zero: OnRankZero = directly,
    ):
        """on_rank_zero: runs a function on rank 0 and returns its result on all ranks; `graders` exists on rank 0."""
        self.settings = settings
        self.grpo = settings.objective.grpo
        self.prompts = prompts
        self.graders = graders
        self.on_rank_zero = on_rank_zero
        self.source = RolloutSource(settings, prompts)
        self.loss = PolicyGradientLoss(
            settings=self.grpo,
            chunk_bytes=settings.objective.chunk_bytes,
            temperature=settings.rollout.temperature,
            kernel=loss_kernel(settings.objective.kernel),
        )

    def step(self, policy: Policy, problems: Sequence[Problem], *, step: int, lr: float) -> StepReport:
        """Samples groups, rewards them and updates up to `updates_per_batch` times."""
        started = time.perf_counter()
        rollouts = self.source.rollouts(policy, problems, step=step)
        sampled = time.perf_counter()
        grades = self.grades(problems, rollouts)
        samples = self.samples(problems, rollouts, [float(grade.correct) for grade in grades], step=step)
        graded = time.perf_counter()
        taken = [index for index, sample in enumerate(samples) if sample.advantage != 0.0]
        updates, stopped_by = self.update(policy, [samples[index] for index in taken], lr=lr)
        first = updates[0].scores if updates else ()
        scores = [SampleScore(loss_sum=0.0, num_tokens=len(s.response_ids), loss_tokens=0) for s in samples]
        for index, score in zip(taken, first, strict=True):
            scores[index] = dataclasses.replace(score, token_logprobs=None)
        every = [score for update in updates for score in update.scores]
        phases = {name: sum(u.seconds[name] for u in updates) for name in (updates[0].seconds if updates else ())}
        metrics = metrics_of(
            step=step,
            samples=samples,
            scores=scores,
            grad_norm=ratio(sum(update.grad_norm for update in updates), len(updates)),
            lr=lr,
            seconds={"rollout": sampled - started, **phases, "step": time.perf_counter() - started},
        )
        metrics |= {
            "reward/mean": statistics.fmean(float(grade.correct) for grade in grades),
            "reward/timeouts": float(sum(grade.outcome == "timeout" for grade in grades)),
            "reward/equal_groups_share": 1.0 - len(taken) / len(samples),
            "updates": float(len(updates)),
            "ratio/clipped_share": mean_of("clipped_ratios", every, lambda score: score.loss_tokens),
            "kl/mean": mean_of("divergence_other", every, lambda score: score.num_tokens),
            "time/grade_s": graded - sampled,
        }
        done = f"step {step} ended after {len(updates)} of {self.grpo.updates_per_batch} updates"
        return StepReport(
            step=step,
            metrics=metrics,
            samples=tuple(samples),
            scores=tuple(scores),
            warnings=(f"{done}: {stopped_by}",) if stopped_by else (),
        )

    def grades(self, problems: Sequence[Problem], rollouts: Sequence[Rollout]) -> list[Grade]:
        """Verdicts in the order of the rollouts."""
        answers = {problem.id: problem.answer for problem in problems}
        pairs = [(self.prompts.response_text(r.response_ids), answers[r.problem_id]) for r in rollouts]
        return self.on_rank_zero(lambda: self.graders.grade(pairs))

    def samples(
        self, problems: Sequence[Problem], rollouts: Sequence[Rollout], rewards: Sequence[float], *, step: int
    ) -> list[Sample]:
        """Each rollout with its advantage and its weight in the mean."""
        size = self.source.samples
        found = [a for start in range(0, len(rewards), size) for a in advantages(rewards[start : start + size])]
        taught = [len(r.response_ids) for r, advantage in zip(rollouts, found, strict=True) if advantage != 0.0]
        samples = []
        for index, (rollout, advantage) in enumerate(zip(rollouts, found, strict=True)):
            problem, weight = problems[index // size], 1.0
            if self.grpo.normalisation == "sequence_mean" and taught:
                weight = sum(taught) / (len(taught) * len(rollout.response_ids))
            samples.append(
                Sample(
                    problem=problem,
                    key=self.source.key(problem, step, rollout.sample_index),
                    rollout=rollout,
                    # The reference of the KL is the teacher's weights, shown what the student is shown.
                    teacher_prompt_ids=rollout.prompt_ids if self.loss.needs_teacher else None,
                    advantage=advantage,
                    weight=weight,
                )
            )
        return samples

    def update(self, policy: Policy, samples: Sequence[Sample], *, lr: float) -> tuple[list[UpdateReport], str]:
        """All updates on these samples; none, and no optimiser step, where no group teaches anything.

        A loss or gradient that is not finite is a FloatingPointError in the first update, before any weight is touched.
        In a later one it ends the updates, since the weights have the earlier ones; the text then says what it was.
        """
        updates: list[UpdateReport] = []
        while samples and len(updates) < self.grpo.updates_per_batch:
            try:
                updates.append(policy.update(samples, self.loss, lr=lr))
            except FloatingPointError as error:
                if not updates:
                    raise
                return updates, str(error)
            if len(updates) == 1:
                first = updates[0].scores
                samples = [
                    dataclasses.replace(sample, old_logprobs=score.token_logprobs)
                    for sample, score in zip(samples, first, strict=True)
                ]
        return updates, ""
