"""Evaluates a model on problems: samples answers, grades them in worker processes and reports Avg@n."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_paint.base.keys import derive_key
from megatron_paint.config.settings import EvaluationSettings
from megatron_paint.data.prompts import Prompts
from megatron_paint.evaluation.answer_file import Key
from megatron_paint.evaluation.statistics import GREEDY, build_report
from megatron_paint.grading.graders import Graders
from megatron_paint.grading.thoughts import PROMPT_TAIL, continued
from megatron_paint.records import Asked, EvalReport, Graded, Problem, Rollout, TokenIds
from megatron_paint.rollouts.engine import GenerationRequest, Sampler, SamplingParameters


@dataclass(frozen=True, kw_only=True, slots=True)
class Answers:
    """The answers of a sampler, before grading."""

    sampled: list[Rollout]  # `evaluation.samples` for each problem
    greedy: list[Rollout]  # one for each problem, or empty


class Evaluator:
    """Evaluates with the same problems and the same keys every time, so that two evaluations can be paired.

    The settings must have a `max_new_tokens` (`training.inputs.fit_answers`), otherwise a ValueError is raised.
    """

    def __init__(self, settings: EvaluationSettings, problems: Sequence[Problem], prompts: Prompts, *, seed: int):
        if settings.max_new_tokens is None:
            raise ValueError("max_new_tokens is None: what fits depends on the model and the prompts; see fit_answers")
        self.settings = settings
        self.problems = tuple(problems)
        self.prompts = prompts
        self.seed = seed

    def sample(
        self,
        sampler: Sampler,
        *,
        done: Mapping[Key, Rollout] | None = None,
        save: Callable[[Sequence[Rollout]], None] = lambda rollouts: None,
        at_once: int | None = None,
    ) -> Answers:
        """Samples the answers. All ranks call it together.

        done: answers that exist already, by (problem id, sample index); a greedy answer has sample index -1. save:
        called with every `at_once` new answers. at_once: None samples all at once.
        """
        settings, done = self.settings, done or {}
        sampling = SamplingParameters.from_settings(settings, stop_ids=self.prompts.tokenizer.stop_ids)

        def take(samples: int, *, greedy: bool) -> list[Rollout]:
            wanted = {(r.problem_id, GREEDY if greedy else r.sample_index): r for r in self._requests(samples)}
            missing = [key for key in wanted if key not in done]
            found = {key: done[key] for key in wanted if key in done}
            for start in range(0, len(missing), at_once or len(missing) or 1):
                keys = missing[start : start + (at_once or len(missing))]
                new = sampler.generate([wanted[key] for key in keys], sampling.greedy() if greedy else sampling)
                found |= {key: replace(r, sample_index=key[1]) for key, r in zip(keys, new, strict=True)}
                save([found[key] for key in keys])
            return [found[key] for key in wanted]

        return Answers(
            sampled=take(settings.samples, greedy=False),
            greedy=take(1, greedy=True) if settings.greedy else [],
        )

    @property
    def count(self) -> int:
        """The number of answers of an evaluation."""
        return len(self.problems) * (self.settings.samples + self.settings.greedy)

    def prompt(self, problem: Problem) -> TokenIds:
        """Returns the prompt of a problem."""
        return self.prompts.evaluation_prompt(problem, self.settings.thinking)

    def report(self, answers: Answers, *, step: int, benchmark: str, graders: Graders) -> EvalReport:
        """Grades the answers and returns the report. Only one rank calls it."""
        sampled, greedy = self._grade(answers.sampled, graders), self._grade(answers.greedy, graders)
        asked = tuple(Asked(id=one.id, problem=one.problem, answer=one.answer) for one in self.problems)
        return replace(build_report(step, benchmark, sampled, greedy=greedy), problems=asked)

    def _requests(self, samples: int) -> list[GenerationRequest]:
        return [
            GenerationRequest(
                problem_id=problem.id,
                sample_index=index,
                prompt_ids=self.prompt(problem),
                key=derive_key(self.seed, "evaluation", problem.id, index),
            )
            for problem in self.problems
            for index in range(samples)
        ]

    def _grade(self, rollouts: Sequence[Rollout], graders: Graders) -> list[Graded]:
        problems = {problem.id: problem for problem in self.problems}
        ungraded = [
            Graded(
                problem_id=rollout.problem_id,
                sample_index=rollout.sample_index,
                response_text=self.prompts.response_text(rollout.response_ids),
                num_tokens=len(rollout.response_ids),
                finished=rollout.finished,
                outcome="no_answer",
                extracted=None,
            )
            for rollout in rollouts
        ]
        ends = [self.prompts.response_text(rollout.prompt_ids[-PROMPT_TAIL:]) for rollout in rollouts]
        return grade_all(ungraded, problems, graders, prompt_ends=ends)


def grade_all(
    ungraded: Sequence[Graded], problems: Mapping[str, Problem], graders: Graders, *, prompt_ends: Sequence[str]
) -> list[Graded]:
    """Returns the responses with their grades.

    problems: by their id. prompt_ends: the last characters of each response's prompt, which may open a thought.
    """
    texts = [continued(end, one.response_text) for end, one in zip(prompt_ends, ungraded, strict=True)]
    grades = graders.grade([(text, problems[one.problem_id]) for text, one in zip(texts, ungraded, strict=True)])
    return [
        replace(
            one,
            outcome=grade.outcome,
            extracted=grade.extracted,
            box_in_thought=grade.box_in_thought,
            domain=problems[one.problem_id].domain,
            score=grade.score,
            error=grade.error,
        )
        for one, grade in zip(ungraded, grades, strict=True)
    ]
