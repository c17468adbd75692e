"""Looks at all training problems for what makes a run teach nothing, before it starts."""

from collections.abc import Sequence

from megatron_paint.base.counts import agreeing, count_text
from megatron_paint.grading.boxes import last_box
from megatron_paint.records import Problem

FEW = 8  # problems; fewer may well have one answer
LONG_ANSWER = 200  # characters; the longest final answers of published problem sets are shorter


def oddities(problems: Sequence[Problem], *, setting: str, solutions: bool) -> tuple[str, ...]:
    """Returns a warning for each oddity, with its count and first problem.

    setting: the section of the columns. solutions: the solutions are used too.
    """
    found = []
    answers = {problem.answer for problem in problems}
    if len(problems) >= FEW and len(answers) == 1:
        found.append(
            f"{setting}.columns.answer: all {len(problems):,} problems have the same answer {problems[0].answer!r}; "
            "name the column of the final answers"
        )
    count = len(problems)
    if long := [problem for problem in problems if len(problem.answer) > LONG_ANSWER]:
        what = f"{agreeing(len(long), 'is', 'are')} longer than {LONG_ANSWER} characters"
        reason = "a final answer is compared, not a worked solution"
        found.append(f"{setting}.columns.answer: {_of(long, count, 'answer')} {what}; {reason}. {_first(long)}")
    if not solutions:
        return tuple(found)
    if bare := [problem for problem in problems if _is_bare(problem)]:
        what = f"{agreeing(len(bare), 'is', 'are')} nothing but the answer"
        reason = "so there is no reasoning to show"
        found.append(f"{setting}.columns.solution: {_of(bare, count, 'solution')} {what}, {reason}. {_first(bare)}")
    if open_ended := [p for p in problems if not _is_bare(p) and last_box(p.solution) is None]:
        what = agreeing(
            len(open_ended), "has no \\boxed{}, so its answer is", "have no \\boxed{}, so their answers are"
        )
        number = _of(open_ended, count, "solution")
        found.append(f"{setting}.columns.solution: {number} {what} not compared. {_first(open_ended)}")
    return tuple(found)


def _is_bare(problem: Problem) -> bool:
    return problem.solution.strip() == problem.answer.strip()


def _of(found: Sequence[Problem], count: int, noun: str) -> str:
    return f"{len(found):,} of {count_text(count, noun)}"


def _first(found: Sequence[Problem]) -> str:
    return f"The first is {found[0].id!r}"
