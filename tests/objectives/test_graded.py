"""Verdicts on rollouts: rank 0 grades, by each problem's own answer, any number of rollouts a problem."""

from types import SimpleNamespace

import pytest

from megatron_paint.grading.grade import Grade
from megatron_paint.grading.graders import Graders
from megatron_paint.objectives.graded import grade_rollouts, grader_warnings, reward_metrics, verdicts_of
from megatron_paint.records import Problem, Rollout
from megatron_paint.runtime.rank_zero import directly

TEXTS = {(0,): "assistant\n", (3,): "\\boxed{3}", (4,): "so \\boxed{4}", (5,): "five"}
PROBLEMS = [Problem(id=name, problem="", solution="", answer=answer) for name, answer in (("a", "3"), ("b", "4"))]
ROLLOUTS = [
    Rollout(problem_id=name, prompt_ids=(0,), response_ids=ids)
    for name, ids in (("a", (3,)), ("a", (4,)), ("b", (4,)), ("a", (5,)))
]
PROMPTS = SimpleNamespace(response_text=TEXTS.__getitem__)


def test_verdicts_by_problem():
    with Graders(workers=1) as graders:
        grades = grade_rollouts(PROBLEMS, ROLLOUTS, prompts=PROMPTS, graders=graders, on_rank_zero=directly)
    assert [grade.outcome for grade in grades] == ["right", "wrong", "right", "no_answer"]
    assert verdicts_of(ROLLOUTS, grades) == {"a": [True, False, False], "b": [True]}
    counts = {"reward/timeouts": 0.0, "reward/errors": 0.0, "reward/box_in_thought": 0.0}
    assert reward_metrics(grades) == {"reward/mean": 0.5, **counts}


def test_other_ranks_get_what_rank_zero_found():
    found = grade_rollouts(PROBLEMS, ROLLOUTS, prompts=PROMPTS, graders=None, on_rank_zero=lambda act: "of rank 0")
    assert found == "of rank 0"


def test_a_warning_needs_a_grade_for_each_rollout():
    failed = Grade(correct=False, extracted=None, outcome="error", error="ValueError: x")
    (warning,) = grader_warnings(ROLLOUTS, [failed] * 4, step=7)
    assert warning.startswith("step 7: 4 of 4 responses have no verdict")
    with pytest.raises(ValueError, match="shorter"):
        grader_warnings(ROLLOUTS, [failed], step=7)
