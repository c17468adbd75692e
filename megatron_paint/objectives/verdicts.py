"""Verdicts on the rollouts of a step: for the objective, and for the order of the problems."""

import statistics
from collections.abc import Sequence

from megatron_paint.data.prompts import Prompts
from megatron_paint.grading.grade import Grade, GradingPool
from megatron_paint.grading.thoughts import PROMPT_TAIL, continued
from megatron_paint.records import Problem, Rollout, Verdicts
from megatron_paint.runtime.rank_zero import OnRankZero


def grade_rollouts(
    problems: Sequence[Problem],
    rollouts: Sequence[Rollout],
    *,
    prompts: Prompts,
    graders: GradingPool | None,
    on_rank_zero: OnRankZero,
) -> list[Grade]:
    """The grades in the order of the rollouts: rank 0 grades, and all ranks get the result.

    problems: those of the rollouts, in any order. graders: those of rank 0; the other ranks have none.
    """
    answers = {problem.id: problem.answer for problem in problems}
    text = prompts.response_text
    pairs = [
        (continued(text(r.prompt_ids[-PROMPT_TAIL:]), text(r.response_ids)), answers[r.problem_id]) for r in rollouts
    ]
    return on_rank_zero(lambda: graders.grade(pairs))


def verdicts_of(rollouts: Sequence[Rollout], grades: Sequence[Grade]) -> Verdicts:
    """Whether each rollout is right, by problem."""
    verdicts: dict[str, list[bool]] = {}
    for rollout, grade in zip(rollouts, grades, strict=True):
        verdicts.setdefault(rollout.problem_id, []).append(grade.correct)
    return verdicts


def grade_metrics(grades: Sequence[Grade]) -> dict[str, float]:
    """The metrics of a step whose rollouts are graded."""
    return {
        "reward/mean": statistics.fmean(float(grade.correct) for grade in grades),
        "reward/timeouts": float(sum(grade.outcome == "timeout" for grade in grades)),
        "reward/box_in_thought": float(sum(grade.box_in_thought for grade in grades)),
    }
