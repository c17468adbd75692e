"""Calls a grader's function in worker processes: a user's `module:function`, or the search for a pattern.

A user's module is imported in these processes alone. Each call has the time limit of the pool. A process that exceeds
it, or ends, is replaced.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from megatron_paint.base.errors import UserError
from megatron_paint.grading.boxes import last_box
from megatron_paint.grading.function_worker import SEARCH
from megatron_paint.grading.grade import Grade
from megatron_paint.grading.pool import ENDED, LATE, WorkerPool
from megatron_paint.records import Problem

PROGRAM = "megatron_paint.grading.function_worker"


class FunctionPool:
    """Calls one function on many responses.

    name: `module:function`; the module is looked for in the current folder first. setting: the key that names it, for
    errors. Raises UserError at the first call if the function cannot be imported or called.
    """

    def __init__(self, name: str, *, setting: str, workers: int, seconds: float, on_verdict: Callable[[], None]):
        self.name, self.setting, self.seconds = name, setting, seconds
        self._pool = WorkerPool(
            workers,
            program=(PROGRAM, name, os.getcwd()),
            failure=f"{setting}={name} cannot be used",
            on_verdict=on_verdict,
        )

    def close(self) -> None:
        """Ends the workers. A later call starts new ones."""
        self._pool.close()

    def grade(self, responses: Sequence[tuple[str, Problem]]) -> list[Grade]:
        """Returns the grade of each (response text, problem). It is right if the function returns True or 1."""
        replies = self._pool.ask([_question(text, problem) for text, problem in responses], seconds=self.seconds)
        return [_grade_of(text, reply) for (text, _), reply in zip(responses, replies, strict=True)]

    def search(self, texts: Sequence[str], pattern: str) -> list[dict[str, Any]]:
        """Returns for each text {"match": the text of the last match or None}, or the reply of a lost worker."""
        questions = [{"response": text, "answer": pattern, "problem": {}} for text in texts]
        return self._pool.ask(questions, seconds=self.seconds)

    def check(self, problem: Problem) -> None:
        """Calls the user's function once, on a problem with its solution as the response.

        Raises UserError if it cannot be imported or called, raises, hangs, or returns what is no verdict.
        """
        (grade,) = self.grade([(problem.solution or problem.answer, problem)])
        reason = grade.error
        if grade.outcome == "timeout":
            reason = f"it did not return within evaluation.grading_seconds={self.seconds:g}"
        if reason:
            given = "solution" if problem.solution else "answer"
            raise UserError(
                f"{self.setting}={self.name} failed on problem {problem.id!r} ({problem.source}), with its {given} as "
                f"the response: {reason}. It must return a verdict on every response"
            )


def search_pool(*, setting: str, workers: int, seconds: float, on_verdict: Callable[[], None]) -> FunctionPool:
    """Returns the pool that searches for patterns, which may never end on a hostile text."""
    return FunctionPool(SEARCH, setting=setting, workers=workers, seconds=seconds, on_verdict=on_verdict)


def _question(text: str, problem: Problem) -> dict[str, Any]:
    return {"response": text, "answer": problem.answer, "problem": asdict(problem)}


def _grade_of(text: str, reply: dict[str, Any]) -> Grade:
    extracted = last_box(text)
    if reply is LATE:
        return Grade(correct=False, extracted=extracted, outcome="timeout")
    if reply is ENDED:
        error = "the process that called it ended: it may have run out of memory, or called os._exit"
        return Grade(correct=False, extracted=extracted, outcome="error", error=error)
    if "error" in reply:
        return Grade(correct=False, extracted=extracted, outcome="error", error=reply["error"])
    correct = reply["score"] == 1
    outcome = "right" if correct else "wrong"
    return Grade(correct=correct, extracted=extracted, outcome=outcome, score=reply["score"])
