"""What objectives that grade their responses share: verdicts, their metrics, and samples that carry no loss."""

import dataclasses
import statistics
from collections.abc import Sequence

from megatron_paint.data.prompts import Prompts
from megatron_paint.grading.grade import Grade
from megatron_paint.grading.graders import Graders, failure_warning
from megatron_paint.grading.thoughts import PROMPT_TAIL, continued
from megatron_paint.records import Problem, Rollout, Sample, SampleScore, Verdicts
from megatron_paint.runtime.rank_zero import OnRankZero


def grade_rollouts(
    problems: Sequence[Problem],
    rollouts: Sequence[Rollout],
    *,
    prompts: Prompts,
    graders: Graders | None,
    on_rank_zero: OnRankZero,
) -> list[Grade]:
    """Verdicts in the order of the rollouts. Rank 0 grades for all ranks. graders: None on every other rank."""
    problem_of = {problem.id: problem for problem in problems}
    text = prompts.response_text
    return on_rank_zero(
        lambda: graders.grade(
            (continued(text(r.prompt_ids[-PROMPT_TAIL:]), text(r.response_ids)), problem_of[r.problem_id])
            for r in rollouts
        )
    )


def verdicts_of(rollouts: Sequence[Rollout], grades: Sequence[Grade]) -> Verdicts:
    """Whether each rollout is right, by problem."""
    verdicts: dict[str, list[bool]] = {}
    for rollout, grade in zip(rollouts, grades, strict=True):
        verdicts.setdefault(rollout.problem_id, []).append(grade.correct)
    return verdicts


def reward_metrics(grades: Sequence[Grade]) -> dict[str, float]:
    """The mean reward, and counts of verdicts that need a look."""
    return {
        "reward/mean": statistics.fmean(grade.reward for grade in grades),
        "reward/timeouts": float(sum(grade.outcome == "timeout" for grade in grades)),
        "reward/errors": float(sum(grade.outcome == "error" for grade in grades)),
        "reward/box_in_thought": float(sum(grade.box_in_thought for grade in grades)),
    }


def grader_warnings(rollouts: Sequence[Rollout], grades: Sequence[Grade], *, step: int) -> tuple[str, ...]:
    """A warning about verdicts that are missing because a user's function failed. grades: one for each rollout."""
    failure = failure_warning([(one.problem_id, grade) for one, grade in zip(rollouts, grades, strict=True)])
    return (f"step {step}: {failure}",) if failure else ()


def scores_of_all(
    samples: Sequence[Sample], taught: Sequence[int], scores: Sequence[SampleScore]
) -> tuple[SampleScore, ...]:
    """The scores in the order of all samples; samples without loss have empty ones. `token_logprobs` are dropped.

    taught: the indices of the samples that `scores` belong to.
    """
    found = [SampleScore(loss_sum=0.0, num_tokens=len(s.response_ids), loss_tokens=0) for s in samples]
    for index, score in zip(taught, scores, strict=True):
        found[index] = dataclasses.replace(score, token_logprobs=None)
    return tuple(found)
