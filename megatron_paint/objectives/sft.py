"""Supervised fine-tuning: cross entropy on the verified solution after the student's prompt."""

import time
from collections.abc import Sequence

from megatron_paint.base.keys import derive_key
from megatron_paint.config.settings import Settings
from megatron_paint.data.prompts import Prompts
from megatron_paint.losses.elementwise.choose import loss_kernel
from megatron_paint.losses.objectives import CrossEntropyLoss
from megatron_paint.objectives.metrics import metrics_of
from megatron_paint.policy import Policy
from megatron_paint.records import Problem, Rollout, Sample, StepReport


class Sft:
    """The objective of `objective.name: sft`."""

    def __init__(self, settings: Settings, prompts: Prompts):
        self.settings = settings
        self.prompts = prompts
        self.loss = CrossEntropyLoss(
            chunk_bytes=settings.objective.chunk_bytes, kernel=loss_kernel(settings.objective.kernel)
        )

    def step(self, policy: Policy, problems: Sequence[Problem], *, step: int, lr: float) -> StepReport:
        """Scores the solutions and updates once."""
        started = time.perf_counter()
        samples = [self.sample(problem, step) for problem in problems]
        update = policy.update(samples, self.loss, lr=lr)
        metrics = metrics_of(
            step=step,
            samples=samples,
            scores=update.scores,
            grad_norm=update.grad_norm,
            lr=lr,
            seconds={**update.seconds, "step": time.perf_counter() - started},
        )
        return StepReport(step=step, metrics=metrics, samples=tuple(samples), scores=update.scores)

    def sample(self, problem: Problem, step: int) -> Sample:
        """The solution as the response to the student's prompt."""
        return Sample(
            problem=problem,
            key=derive_key(self.settings.run.seed, step, problem.id, 0),
            rollout=Rollout(
                problem_id=problem.id,
                prompt_ids=self.prompts.student_prompt(problem),
                response_ids=self.prompts.sft_response(problem),
            ),
        )
