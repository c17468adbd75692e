"""Compares each answer with the last box of its solution. Rows where they differ are bad."""

from collections.abc import Callable, Iterable, Mapping

from megatron_paint.data.cells import BadRow
from megatron_paint.grading.boxes import last_box
from megatron_paint.grading.grade import Grade
from megatron_paint.grading.normal_form import same_text
from megatron_paint.records import Problem

Grader = Callable[[list[tuple[str, str]]], list[Grade]]  # (solution, answer) pairs, as `GradingPool.grade` takes them


def verdicts_on(problems: Iterable[Problem], grade: Grader) -> dict[str, Grade]:
    """Returns the grader's verdict on each answer whose text differs from its solution's last box, by the row's place.

    The grader gets all of them in one call, which its workers divide between them. No other answer has a verdict.
    """
    undecided = [problem for problem in problems if _undecided(problem)]
    pairs = [(problem.solution, problem.answer) for problem in undecided]
    grades = grade(pairs) if pairs else []
    return {problem.source: found for problem, found in zip(undecided, grades, strict=True)}


def check_answer(problem: Problem, verdicts: Mapping[str, Grade]) -> str | None:
    """Raises BadRow if the answer differs from the solution's last box. Returns a note if the grader timed out."""
    verdict = verdicts.get(problem.source)
    if verdict is None or verdict.correct or verdict.outcome == "no_answer":  # no_answer: in a thought that never ends
        return None
    box = last_box(problem.solution)
    if verdict.outcome == "timeout":
        return f"the grader ran out of time comparing answer {problem.answer!r} with box {box!r}; the row is kept"
    fault = "differs from the solution's last box"
    raise BadRow(
        f"answer {problem.answer!r} {fault} {box!r}",
        role="answer",
        fault=fault,
        fix=f"The first: {problem.answer!r} and {box!r}. Name the right columns, or set data.check_answers: false",
    )


def _undecided(problem: Problem) -> bool:
    box = last_box(problem.solution)
    return box is not None and not same_text(box, problem.answer)
