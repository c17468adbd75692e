"""Supervised fine-tuning: cross entropy on the verified solution after the student's prompt."""

from collections.abc import Sequence

from megatron_paint.config.objective import ObjectiveSettings
from megatron_paint.data.prompts import Prompts
from megatron_paint.losses.elementwise.choose import loss_kernel
from megatron_paint.losses.objectives import CrossEntropyLoss
from megatron_paint.objectives.interface import ObjectiveInputs
from megatron_paint.policy import Policy
from megatron_paint.records import Problem, Rollout, Sample, StepResult
from megatron_paint.rollouts.source import sample_key
from megatron_paint.runtime.timer import Timer


class Sft:
    """The objective of `objective.name: sft`."""

    def __init__(self, inputs: ObjectiveInputs):
        settings = inputs.settings
        self.prompts = inputs.prompts
        self.seed = inputs.rollouts.seed
        self.loss = CrossEntropyLoss(chunk_bytes=settings.chunk_bytes, kernel=loss_kernel(settings.kernel))

    def step(self, policy: Policy, problems: Sequence[Problem], *, step: int, lr: float, timer: Timer) -> StepResult:
        """Scores the solutions and updates once."""
        samples = tuple(self.sample(problem, step) for problem in problems)
        update = policy.update(samples, self.loss, lr=lr)
        return StepResult(samples=samples, scores=update.scores, updates=(update,))

    def sample(self, problem: Problem, step: int) -> Sample:
        """The solution as the response to the student's prompt."""
        return Sample(
            problem=problem,
            key=sample_key(self.seed, step=step, problem=problem),
            rollout=Rollout(
                problem_id=problem.id,
                prompt_ids=self.prompts.student_prompt(problem),
                response_ids=self.prompts.sft_response(problem),
            ),
        )

    @staticmethod
    def longest_prompt(problem: Problem, prompts: Prompts, settings: ObjectiveSettings, *, response: int) -> int:
        """Tokens of the student's prompt and of the solution."""
        return len(prompts.student_prompt(problem)) + len(prompts.sft_response(problem))
