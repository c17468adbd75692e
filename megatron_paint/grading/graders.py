"""Grades responses to problems of any domain, each with the grader of its problem's domain.

`math` is in grade.py, `exact` and `choice` compare text here, and `regex` and a user's function work in processes with
a time limit.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence

from megatron_paint.base.counts import agreeing, count_text
from megatron_paint.base.errors import UserError
from megatron_paint.config.domains import DomainSettings, domain_of
from megatron_paint.grading.final_answers import choice_in, final_answer, letter_of, texts_equal
from megatron_paint.grading.functions import FunctionPool, search_pool
from megatron_paint.grading.grade import (
    DEFAULT_RULES,
    SECONDS,
    Grade,
    GradingPool,
    Rules,
    box_in_unfinished_thought,
)
from megatron_paint.grading.thoughts import THINK_END, answer_text
from megatron_paint.records import Problem

MOST_WORKERS = 8
Response = tuple[str, Problem]  # its text, and the problem that it answers


class Graders:
    """The graders of all domains. Their workers start when they are needed, and run until `close`.

    domains: the section `domains`. seconds: time limit of one verdict. rules: of the grader `math`; its policy about
    boxes in thoughts holds for `exact`, `choice` and `regex` too. on_verdict: called after each verdict of a worker.
    """

    def __init__(
        self,
        domains: Mapping[str, DomainSettings] | None = None,
        *,
        workers: int | None = None,
        seconds: float = SECONDS,
        rules: Rules = DEFAULT_RULES,
        on_verdict: Callable[[], None] = lambda: None,
    ) -> None:
        self.domains, self.rules = domains or {}, rules
        self._limits = {
            "workers": workers or min(MOST_WORKERS, os.cpu_count() or 1),
            "seconds": seconds,
            "on_verdict": on_verdict,
        }
        self._math = GradingPool(workers, seconds, rules=rules, on_verdict=on_verdict)
        self._pools: dict[str, FunctionPool] = {}  # by domain

    def __enter__(self) -> "Graders":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers. A later call starts new ones."""
        self._math.close()
        for pool in self._pools.values():
            pool.close()

    def grade(self, responses: Iterable[Response]) -> list[Grade]:
        """Returns the grades in the order of the responses. Raises UserError for a function that cannot be called."""
        responses = list(responses)
        grades: dict[int, Grade] = {}
        for domain in dict.fromkeys(problem.domain for _, problem in responses):
            indices = [index for index, (_, problem) in enumerate(responses) if problem.domain == domain]
            found = self._grade_domain(domain, [responses[index] for index in indices])
            grades |= zip(indices, found, strict=True)
        return [grades[index] for index in range(len(responses))]

    def check(self, problems: Iterable[Problem]) -> None:
        """Calls the user's functions of these problems once each. Raises UserError if one cannot grade."""
        first: dict[str, Problem] = {}
        for problem in problems:
            first.setdefault(problem.domain, problem)
        for domain, problem in first.items():
            if domain_of(self.domains, domain).function is not None:
                self._function(domain).check(problem)

    def _grade_domain(self, domain: str, responses: Sequence[Response]) -> list[Grade]:
        settings = domain_of(self.domains, domain)
        if settings.function is not None:
            return self._function(domain).grade(responses)
        match settings.grader:
            case "exact":
                return [self._exact(text, problem, settings) for text, problem in responses]
            case "choice":
                return [self._choice(text, problem) for text, problem in responses]
            case "regex":
                return self._regex(domain, responses, settings)
            case "math":
                return self._math.grade([(text, problem.answer) for text, problem in responses])
            case unknown:
                raise UserError(f"domains.{domain}.grader: {unknown!r} is not a grader of this version")

    def _exact(self, text: str, problem: Problem, settings: DomainSettings) -> Grade:
        found = final_answer(answer_text(text, self.rules.box_in_thought))
        return _compared(text, found, found is not None and _equal(found, problem, settings))

    def _choice(self, text: str, problem: Problem) -> Grade:
        found = choice_in(answer_text(text, self.rules.box_in_thought))
        gold = letter_of(problem.answer, problem.choices)
        given = None if found is None else letter_of(found, problem.choices)
        return _compared(text, found, given is not None and given == gold)

    def _regex(self, domain: str, responses: Sequence[Response], settings: DomainSettings) -> list[Grade]:
        if domain not in self._pools:
            self._pools[domain] = search_pool(setting=f"domains.{domain}.grader", **self._limits)
        policy = self.rules.box_in_thought
        tails = [answer_text(text, policy).rpartition(THINK_END)[2] for text, _ in responses]
        grades = []
        for (text, problem), reply in zip(
            responses, self._pools[domain].search(tails, settings.pattern or ""), strict=True
        ):
            found = reply.get("match")
            if "match" in reply:
                grades.append(_compared(text, found, found is not None and _equal(found, problem, settings)))
            else:
                grades.append(Grade(correct=False, extracted=None, outcome="timeout"))
        return grades

    def _function(self, domain: str) -> FunctionPool:
        if domain not in self._pools:
            name = domain_of(self.domains, domain).grader
            self._pools[domain] = FunctionPool(name, setting=f"domains.{domain}.grader", **self._limits)
        return self._pools[domain]


def failure_warning(graded: Sequence[tuple[str, Grade]]) -> str | None:
    """Returns a warning about verdicts that are missing because a function failed; None if none is missing.

    graded: problem ids with the grades of their responses.
    """
    failed = [(problem_id, grade.error) for problem_id, grade in graded if grade.outcome == "error"]
    if not failed:
        return None
    problem_id, error = failed[0]
    return (
        f"{len(failed):,} of {count_text(len(graded), 'response')} "
        f"{agreeing(len(failed), 'has no verdict and counts', 'have no verdict and count')} as 0, because their grader "
        f"failed. The first is of problem {problem_id!r}: {error}"
    )


def _equal(given: str, problem: Problem, settings: DomainSettings) -> bool:
    return texts_equal(given, problem.answer, ignore_case=settings.ignore_case, white_space=settings.white_space)


def _compared(text: str, found: str | None, correct: bool) -> Grade:
    outcome = "no_answer" if found is None else "right" if correct else "wrong"
    in_thought = box_in_unfinished_thought(text)
    return Grade(correct=correct, extracted=found, outcome=outcome, box_in_thought=in_thought)
