"""What objectives that grade their responses share: verdicts, their metrics, and samples that carry no loss."""

import dataclasses
import statistics
from collections.abc import Sequence

from megatron_paint.data.prompts import Prompts
from megatron_paint.grading.grade import Grade, GradingPool
from megatron_paint.grading.thoughts import PROMPT_TAIL, continued
from megatron_paint.records import Problem, Rollout, Sample, SampleScore, Verdicts
from megatron_paint.runtime.rank_zero import OnRankZero


def grade_rollouts(
    problems: Sequence[Problem],
    rollouts: Sequence[Rollout],
    *,
    prompts: Prompts,
    graders: GradingPool | None,
    on_rank_zero: OnRankZero,
) -> list[Grade]:
    """Verdicts in the order of the rollouts. Rank 0 grades for all ranks. graders: None on every other rank."""
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


def reward_metrics(grades: Sequence[Grade]) -> dict[str, float]:
    """The share of right responses, and counts of verdicts that need a look."""
    return {
        "reward/mean": statistics.fmean(float(grade.correct) for grade in grades),
        "reward/timeouts": float(sum(grade.outcome == "timeout" for grade in grades)),
        "reward/box_in_thought": float(sum(grade.box_in_thought for grade in grades)),
    }


def scores_of_all(
    samples: Sequence[Sample], taught: Sequence[int], scores: Sequence[SampleScore]
) -> tuple[SampleScore, ...]:
    """The scores in the order of all samples; samples without loss have empty ones.

    taught: the indices of the samples that `scores` belong to.
    """
    found = [SampleScore(loss_sum=0.0, num_tokens=len(s.response_ids), loss_tokens=0) for s in samples]
    for index, score in zip(taught, scores, strict=True):
        found[index] = dataclasses.replace(score, token_logprobs=None)
    return tuple(found)
