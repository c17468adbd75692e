"""Rollouts of a step, for every objective that learns from them: sampled by the student, or read from a file."""

from collections.abc import Sequence

from megatron_paint.base.keys import derive_key
from megatron_paint.config.settings import Settings
from megatron_paint.data.prompts import Prompts
from megatron_paint.policy import GenerationRequest, Policy, SamplingParameters
from megatron_paint.records import Problem, Rollout
from megatron_paint.rollouts.replay import ReplayEngine


class RolloutSource:
    """`objective.samples_per_problem` responses to each problem's student prompt."""

    def __init__(self, settings: Settings, prompts: Prompts):
        self.settings = settings
        self.prompts = prompts
        self.samples = settings.objective.samples_per_problem
        self.stop_ids = frozenset(prompts.tokenizer.stop_ids)
        self.replay = None
        if settings.rollout.engine == "replay":
            self.replay = ReplayEngine(settings.rollout.path, stop_ids=self.stop_ids)

    def rollouts(self, policy: Policy, problems: Sequence[Problem], *, step: int) -> list[Rollout]:
        """All responses to the first problem, then all to the second, and so on."""
        prompts = [self.prompts.student_prompt(problem) for problem in problems]
        if self.replay is not None:
            return self.replay.rollouts(step, problems, prompts, samples=self.samples)
        requests = [
            GenerationRequest(
                problem_id=problem.id, sample_index=index, prompt_ids=prompt, key=self.key(problem, step, index)
            )
            for problem, prompt in zip(problems, prompts, strict=True)
            for index in range(self.samples)
        ]
        rollout = self.settings.rollout
        sampling = SamplingParameters(
            max_new_tokens=rollout.max_new_tokens,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            stop_ids=self.stop_ids,
        )
        return policy.generate(requests, sampling)

    def key(self, problem: Problem, step: int, index: int = 0) -> int:
        """All randomness of one sample of a step."""
        return derive_key(self.settings.run.seed, step, problem.id, index)
