"""Avg@n of a policy on a file of problems: sample, grade in worker processes, report."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_paint.config import EvaluationSettings
from megatron_paint.evaluation.grading import GradingPool
from megatron_paint.evaluation.statistics import build_report
from megatron_paint.keys import derive_key
from megatron_paint.policy import GenerationRequest, Policy, SamplingParameters
from megatron_paint.prompts import Prompts
from megatron_paint.records import EvalReport, Graded, Problem, Rollout


@dataclass(frozen=True, kw_only=True, slots=True)
class Answers:
    """What a policy answered, not yet graded."""

    sampled: list[Rollout]  # `evaluation.samples` a problem
    greedy: list[Rollout]  # one a problem, or none


class Evaluator:
    """Evaluates on the same problems with the same keys every time, so that two evaluations can be paired."""

    def __init__(self, settings: EvaluationSettings, problems: Sequence[Problem], prompts: Prompts, *, seed: int):
        self.settings = settings
        self.problems = tuple(problems)
        self.prompts = prompts
        self.seed = seed

    def sample(self, policy: Policy) -> Answers:
        """The policy's answers; every rank takes part."""
        settings = self.settings
        return Answers(
            sampled=policy.generate(self._requests(settings.samples), self._sampling(settings.temperature)),
            greedy=policy.generate(self._requests(1), self._sampling(0.0)) if settings.greedy else [],
        )

    def report(self, answers: Answers, *, step: int, benchmark: str, graders: GradingPool) -> EvalReport:
        """The answers graded; the work of one rank."""
        sampled, greedy = self._grade(answers.sampled, graders), self._grade(answers.greedy, graders)
        return build_report(step, benchmark, sampled, greedy=greedy)

    def _requests(self, samples: int) -> list[GenerationRequest]:
        return [
            GenerationRequest(
                problem_id=problem.id,
                sample_index=index,
                prompt_ids=self.prompts.evaluation_prompt(problem, self.settings.thinking),
                key=derive_key(self.seed, "evaluation", problem.id, index),
            )
            for problem in self.problems
            for index in range(samples)
        ]

    def _sampling(self, temperature: float) -> SamplingParameters:
        return SamplingParameters(
            max_new_tokens=self.settings.max_new_tokens,
            temperature=temperature,
            top_p=self.settings.top_p,
            top_k=self.settings.top_k,
            stop_ids=frozenset(self.prompts.tokenizer.stop_ids),
        )

    def _grade(self, rollouts: Sequence[Rollout], graders: GradingPool) -> list[Graded]:
        answers = {problem.id: problem.answer for problem in self.problems}
        texts = [self.prompts.response_text(rollout.response_ids) for rollout in rollouts]
        pairs = [(text, answers[rollout.problem_id]) for text, rollout in zip(texts, rollouts, strict=True)]
        return [
            Graded(
                problem_id=rollout.problem_id,
                sample_index=rollout.sample_index,
                response_text=text,
                num_tokens=len(rollout.response_ids),
                finished=rollout.finished,
                outcome=grade.outcome,
                extracted=grade.extracted,
            )
            for rollout, text, grade in zip(rollouts, texts, graders.grade(pairs), strict=True)
        ]
