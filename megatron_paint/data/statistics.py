"""Looks at all training problems for what makes a run teach nothing, before it starts."""

from collections.abc import Sequence

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
    found += _counted(
        [problem for problem in problems if len(problem.answer) > LONG_ANSWER],
        len(problems),
        f"{setting}.columns.answer: {{}} answers are longer than {LONG_ANSWER} characters; a final answer is compared, "
        "not a worked solution",
    )
    if not solutions:
        return tuple(found)
    found += _counted(
        [problem for problem in problems if _is_bare(problem)],
        len(problems),
        f"{setting}.columns.solution: {{}} solutions are nothing but the answer, so there is no reasoning to show",
    )
    found += _counted(
        [problem for problem in problems if not _is_bare(problem) and last_box(problem.solution) is None],
        len(problems),
        f"{setting}.columns.solution: {{}} solutions have no \\boxed{{{{}}}}, so their answers are not compared",
    )
    return tuple(found)


def _is_bare(problem: Problem) -> bool:
    return problem.solution.strip() == problem.answer.strip()


def _counted(found: Sequence[Problem], count: int, message: str) -> list[str]:
    if not found:
        return []
    return [f"{message.format(f'{len(found):,} of {count:,}')}. The first is {found[0].id!r}"]
