"""GRPO, one step from problems to updates (arXiv 2402.03300): the reward of a right answer is 1, of any other 0.

A user's own grader may return any reward from 0 to 1.

The student samples a group of responses per problem. The advantage of a response is the distance of its reward from the
mean of its group, in standard deviations. A positive advantage makes each token of the response more likely, within a
clipped ratio. A group whose rewards are all equal teaches nothing and is left out.
"""

import dataclasses
import statistics
from collections.abc import Sequence

from megatron_paint.base.counts import count_text
from megatron_paint.config.objective import ObjectiveSettings
from megatron_paint.data.prompts import Prompts
from megatron_paint.grading.grade import Grade
from megatron_paint.losses.elementwise.choose import loss_kernel
from megatron_paint.losses.objectives import PolicyGradientLoss
from megatron_paint.objectives.graded import grade_rollouts, grader_warnings, reward_metrics, scores_of_all, verdicts_of
from megatron_paint.objectives.interface import ObjectiveInputs
from megatron_paint.objectives.metrics import mean_of
from megatron_paint.policy import Policy
from megatron_paint.records import Problem, Rollout, Sample, StepResult, UpdateReport
from megatron_paint.rollouts.source import sample_key
from megatron_paint.runtime.timer import Timer

EPSILON = 1e-6  # added to a group's standard deviation


def advantages(rewards: Sequence[float]) -> list[float]:
    """(r - mean) / (std + 1e-6) of one group; the standard deviation divides by n - 1. Exactly 0 if all are equal."""
    mean, deviation = statistics.fmean(rewards), statistics.stdev(rewards)
    return [(reward - mean) / (deviation + EPSILON) if deviation else 0.0 for reward in rewards]


class Grpo:
    """The objective of `objective.name: grpo`."""

    def __init__(self, inputs: ObjectiveInputs):
        settings = inputs.settings
        self.settings = settings.grpo
        self.prompts = inputs.prompts
        self.rollouts = inputs.rollouts
        self.graders = inputs.graders
        self.on_rank_zero = inputs.on_rank_zero
        self.loss = PolicyGradientLoss(
            settings=settings.grpo,
            chunk_bytes=settings.chunk_bytes,
            temperature=inputs.rollouts.sampling.temperature,
            kernel=loss_kernel(settings.kernel),
        )

    def step(self, policy: Policy, problems: Sequence[Problem], *, step: int, lr: float, timer: Timer) -> StepResult:
        """Samples groups, rewards them and updates up to `updates_per_batch` times."""
        with timer("rollout"):
            rollouts = self.rollouts.rollouts(problems, step=step)
        with timer("grade"):
            grades = self.grades(problems, rollouts)
        samples = self.samples(problems, rollouts, grades, step=step)
        taught = [index for index, sample in enumerate(samples) if sample.advantage != 0.0]
        updates, stopped_by = self.update(policy, [samples[index] for index in taught], lr=lr)
        done = f"step {step} ended after {len(updates)} of {count_text(self.settings.updates_per_batch, 'update')}"
        return StepResult(
            samples=tuple(samples),
            scores=scores_of_all(samples, taught, updates[0].scores if updates else ()),
            updates=tuple(updates),
            extras=self.extras(grades, taught, updates),
            warnings=(
                *((f"{done}: {stopped_by}",) if stopped_by else ()),
                *grader_warnings(rollouts, grades, step=step),
            ),
            verdicts=verdicts_of(rollouts, grades),
        )

    def extras(
        self, grades: Sequence[Grade], taught: Sequence[int], updates: Sequence[UpdateReport]
    ) -> dict[str, float]:
        """The metrics that only GRPO has."""
        every = [score for update in updates for score in update.scores]
        return {
            **reward_metrics(grades),
            "reward/equal_groups_share": 1.0 - len(taught) / len(grades),
            "updates": float(len(updates)),
            "ratio/clipped_share": mean_of("clipped_ratios", every, lambda score: score.loss_tokens),
            "kl/mean": mean_of("divergence_other", every, lambda score: score.num_tokens),
        }

    def grades(self, problems: Sequence[Problem], rollouts: Sequence[Rollout]) -> list[Grade]:
        """Verdicts in the order of the rollouts."""
        return grade_rollouts(
            problems, rollouts, prompts=self.prompts, graders=self.graders, on_rank_zero=self.on_rank_zero
        )

    def samples(
        self, problems: Sequence[Problem], rollouts: Sequence[Rollout], grades: Sequence[Grade], *, step: int
    ) -> list[Sample]:
        """Each rollout with its verdict, its advantage and its weight in the mean."""
        size, rewards = self.rollouts.samples, [grade.reward for grade in grades]
        found = [a for start in range(0, len(rewards), size) for a in advantages(rewards[start : start + size])]
        taught = [len(r.response_ids) for r, advantage in zip(rollouts, found, strict=True) if advantage != 0.0]
        samples = []
        for index, (rollout, grade, advantage) in enumerate(zip(rollouts, grades, found, strict=True)):
            problem, weight = problems[index // size], 1.0
            if self.settings.normalisation == "sequence_mean" and taught:
                weight = sum(taught) / (len(taught) * len(rollout.response_ids))
            samples.append(
                Sample(
                    problem=problem,
                    key=sample_key(self.rollouts.seed, step=step, problem=problem, index=rollout.sample_index),
                    rollout=rollout,
                    # The reference of the KL is the teacher's weights, shown what the student is shown.
                    teacher_prompt_ids=rollout.prompt_ids if self.loss.needs_teacher else None,
                    reward=grade.reward,
                    advantage=advantage,
                    old_logprobs=rollout.logprobs if rollout.is_behind else None,
                    weight=weight,
                    correct=grade.correct,
                )
            )
        return samples

    def update(self, policy: Policy, samples: Sequence[Sample], *, lr: float) -> tuple[list[UpdateReport], str]:
        """Does all updates on these samples. Without samples it does none, and no optimiser step.

        Raises FloatingPointError if a loss or gradient of the first update is not finite; no weight is changed then. A
        later update that is not finite ends the updates; the returned text is its error. The weights keep the earlier
        updates.
        """
        updates: list[UpdateReport] = []
        while samples and len(updates) < self.settings.updates_per_batch:
            try:
                updates.append(policy.update(samples, self.loss, lr=lr))
            except FloatingPointError as error:
                if not updates:
                    raise
                return updates, str(error)
            if len(updates) == 1:
                first = updates[0].scores
                samples = [
                    dataclasses.replace(sample, old_logprobs=sample.old_logprobs or score.token_logprobs)
                    for sample, score in zip(samples, first, strict=True)
                ]
        return updates, ""

    @staticmethod
    def longest_prompt(problem: Problem, prompts: Prompts, settings: ObjectiveSettings, *, response: int) -> int:
        """Tokens of the student's prompt."""
        return len(prompts.student_prompt(problem))
