"""PAINT, one step from problems to update (arXiv 2604.26573); OPSD (arXiv 2601.18734) is its special case.

The student samples one response per problem. The more of the reference a response reproduces, the more of the reference
is hidden from the teacher, which is the same network. The teacher scores the response again; the student moves towards
the teacher's distribution, mixed with its own where their entropies differ most. OPSD shows everything and mixes
nothing.
"""

import dataclasses
from collections.abc import Sequence

from megatron_paint.config.settings import ObjectiveSettings
from megatron_paint.data.prompts import Prompts
from megatron_paint.losses.elementwise.choose import loss_kernel
from megatron_paint.losses.objectives import DistillationLoss
from megatron_paint.masker.reveal import limit_hidden, reveal_step
from megatron_paint.objectives.interface import ObjectiveInputs
from megatron_paint.policy import Policy, ScoredSequence
from megatron_paint.records import Problem, Reveal, Rollout, Sample, StepResult
from megatron_paint.rollouts.source import sample_key
from megatron_paint.runtime.timer import Timer


class Paint:
    """The objective of `objective.name: paint` and `opsd`."""

    def __init__(self, inputs: ObjectiveInputs):
        settings = inputs.settings
        self.settings = settings.reveal
        self.prompts = inputs.prompts
        self.rollouts = inputs.rollouts
        self.masker = inputs.masker
        self.on_rank_zero = inputs.on_rank_zero
        # Greedy log-probabilities are taken at temperature 1.
        self.loss = DistillationLoss(
            config=settings.loss,
            chunk_bytes=settings.chunk_bytes,
            kernel=loss_kernel(settings.kernel),
            token_temperature=inputs.rollouts.sampling.temperature or 1.0,
        )

    def step(self, policy: Policy, problems: Sequence[Problem], *, step: int, lr: float, timer: Timer) -> StepResult:
        """Samples, masks, scores and updates once."""
        with timer("rollout"):
            rollouts = self.rollouts.rollouts(problems, step=step)
        with timer("mask"):
            samples = self.samples(problems, rollouts, step=step)
        with timer("teacher"):
            samples = self.limited(policy, samples)
        update = policy.update(samples, self.loss, lr=lr)
        return StepResult(samples=tuple(samples), scores=update.scores, updates=(update,))

    def samples(self, problems: Sequence[Problem], rollouts: Sequence[Rollout], *, step: int) -> list[Sample]:
        """Each rollout with the prompts of student and teacher. The teacher's prompt shows what the masker reveals."""
        keys = [sample_key(self.rollouts.seed, step=step, problem=problem) for problem in problems]
        reveals = self.on_rank_zero(
            lambda: reveal_step(
                problems,
                [self.prompts.response_text(rollout.response_ids) for rollout in rollouts],
                settings=self.settings,
                keys=keys,
                token_offsets=self.prompts.solution_offsets,
                pool=self.masker,
            )
        )
        return [self._sample(*row) for row in zip(problems, rollouts, reveals, keys, strict=True)]

    def limited(self, policy: Policy, samples: list[Sample]) -> list[Sample]:
        """Shows more of each solution, until what is hidden surprises the teacher by at most `reveal.hidden_nats`.

        Costs one more pass without gradient: the teacher scores the references that are partly hidden.
        """
        if self.settings.hidden_nats is None:
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
            reveal = limit_hidden(sample.reveal, surprise, settings=self.settings, offsets=offsets)
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

    @staticmethod
    def longest_prompt(problem: Problem, prompts: Prompts, settings: ObjectiveSettings, *, response: int) -> int:
        """Tokens of the teacher's prompt with almost all of the solution and the line that the rest is hidden.

        With `hidden_nats` the teacher also scores the solution after that prompt, which may be longer than a response.
        """
        scored = 0 if settings.reveal.hidden_nats is None else len(prompts.solution_offsets(problem.solution))
        return prompts.longest_prompt(problem) + max(0, scored - response)
