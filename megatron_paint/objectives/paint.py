"""PAINT, one step from problems to update (arXiv 2604.26573); OPSD (arXiv 2601.18734) is its special case.

The student samples one response per problem. The more of the reference a response reproduces, the more of the reference
is hidden from the teacher, which is the same network. The teacher scores the response again; the student moves towards
the teacher's distribution, mixed with its own where their entropies differ most. OPSD shows everything and mixes
nothing.
"""

from collections.abc import Sequence

from megatron_paint.config.objective import ObjectiveSettings
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
        self.domains = inputs.domains
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
            reveals = self.reveals(problems, rollouts, step=step)
        with timer("teacher"):
            reveals = self.limit_hidden(policy, problems, reveals)
        samples = self.samples(problems, rollouts, reveals, step=step)
        update = policy.update(samples, self.loss, lr=lr)
        return StepResult(samples=samples, scores=update.scores, updates=(update,))

    def reveals(self, problems: Sequence[Problem], rollouts: Sequence[Rollout], *, step: int) -> list[Reveal]:
        """How much of each solution the masker shows the teacher."""
        texts = [self.prompts.response_text(rollout.response_ids) for rollout in rollouts]
        return self.on_rank_zero(
            lambda: reveal_step(
                problems,
                texts,
                settings=self.settings,
                keys=[self._key(problem, step) for problem in problems],
                token_offsets=self.prompts.solution_offsets,
                pool=self.masker,
                domains=self.domains,
            )
        )

    def limit_hidden(self, policy: Policy, problems: Sequence[Problem], reveals: list[Reveal]) -> list[Reveal]:
        """Shows more of a solution where its hidden part surprises the teacher by more than `reveal.hidden_nats`.

        Costs one more pass without gradient: the teacher scores the references that are partly hidden.
        """
        if self.settings.hidden_nats is None:
            return reveals
        partly = [index for index, reveal in enumerate(reveals) if reveal.shown_tokens < reveal.total_tokens]
        references = [
            ScoredSequence(
                prompt_ids=self.prompts.teacher_prompt(problems[index], reveals[index]),
                response_ids=self.prompts.solution_ids(reveals[index].reference),
            )
            for index in partly
        ]
        limited = list(reveals)
        scored = policy.logprobs(references, weights="teacher") if partly else []
        for index, logprobs in zip(partly, scored, strict=True):
            surprise = [-logprob for logprob in logprobs]
            offsets = self.prompts.solution_offsets(reveals[index].reference)
            limited[index] = limit_hidden(reveals[index], surprise, settings=self.settings, offsets=offsets)
        return limited

    def samples(
        self, problems: Sequence[Problem], rollouts: Sequence[Rollout], reveals: Sequence[Reveal], *, step: int
    ) -> tuple[Sample, ...]:
        """Each rollout with what the teacher is shown for it."""
        return tuple(
            Sample(
                problem=problem,
                key=self._key(problem, step),
                rollout=rollout,
                teacher_prompt_ids=self.prompts.teacher_prompt(problem, reveal),
                full_teacher_prompt_ids=self.prompts.full_teacher_prompt(problem, reveal)
                if self.loss.needs_full_teacher
                else None,
                reveal=reveal,
            )
            for problem, rollout, reveal in zip(problems, rollouts, reveals, strict=True)
        )

    def _key(self, problem: Problem, step: int) -> int:
        return sample_key(self.rollouts.seed, step=step, problem=problem)

    @staticmethod
    def longest_prompt(problem: Problem, prompts: Prompts, settings: ObjectiveSettings, *, response: int) -> int:
        """Tokens of the teacher's prompt with almost all of the solution and the line that the rest is hidden.

        With `hidden_nats` the teacher also scores the solution after that prompt, which may be longer than a response.
        """
        scored = 0 if settings.reveal.hidden_nats is None else len(prompts.solution_offsets(problem.solution))
        return prompts.longest_prompt(problem) + max(0, scored - response)
