"""Warnings of training that teaches nothing: once when it happens, and again at the end."""

import json
import math

import pytest

from megatron_paint.run.console import Progress
from megatron_paint.run.folder import RunFolder
from megatron_paint.run.learning_watch import SIGNS, LearningWatch
from megatron_paint.run.results import print_results

LIMITS = {
    "reward/equal_groups_share": (1.0, 5, "every group had equal rewards"),
    "rollout/kept": (0.0, 5, "no response was trained on"),
    "response/truncated_share": (1.0, 5, "every response was cut off"),
    "response/no_answer_share": (1.0, 5, "no response had a final answer"),
    "overlap/mean": (0.0, 10, "no response shared anything with its reference"),
}


def told(values, metric, watch):
    """By step: the warnings."""
    return {step: watch.update({"step": step, metric: value}) for step, value in enumerate(values, start=1)}


def test_every_sign_is_tested():
    assert {sign.metric for sign in SIGNS} == set(LIMITS)


@pytest.mark.parametrize("metric", LIMITS)
def test_a_warning_when_it_happens_and_at_the_end(metric):
    value, limit, text = LIMITS[metric]
    watch = LearningWatch()
    found = told([*[value] * (limit - 1), 0.5, *[value] * 30, 0.5], metric, watch)
    assert [step for step, warnings in found.items() if warnings] == [2 * limit]
    (warning,) = found[2 * limit]
    assert warning.startswith(f"in {limit} steps in a row, up to step {2 * limit}, {text}")
    assert "Likely causes: (1) " in warning
    assert "(2) " in warning
    (end,) = watch.summary()
    assert end.startswith(f"in 30 steps in a row, up to step {limit + 30}, {text}")


@pytest.mark.parametrize("metric", LIMITS)
@pytest.mark.parametrize("nearly", [0.999, 0.001, math.nan, None])
def test_no_warning_without_reason(metric, nearly):
    watch = LearningWatch()
    assert not any(told([nearly] * 20, metric, watch).values())
    assert watch.summary() == []


@pytest.mark.parametrize("metric", LIMITS)
def test_a_short_run_is_told_at_its_end(metric):
    value, limit, text = LIMITS[metric]
    watch = LearningWatch()
    assert not any(told([value] * 3, metric, watch).values())
    assert limit > 3
    (end,) = watch.summary()
    assert end.startswith(f"in all 3 steps {text}")


def test_skipped_steps_do_not_count():
    watch = LearningWatch()
    lines = [
        {"step": step, "skipped": "nan"} if step == 3 else {"step": step, "overlap/mean": 0.0} for step in range(1, 12)
    ]
    assert [line["step"] for line in lines if watch.update(line)] == [11]
    assert LearningWatch().summary() == []


def test_the_end_of_a_run_reads_its_metrics(tmp_path, capsys):
    """Also of the steps before a restart, and of a finished run whose results are printed again."""
    folder = RunFolder(tmp_path)
    for step in range(1, 8):
        folder.append_metrics({"step": step, "reward/equal_groups_share": float(step > 2), "overlap/mean": math.nan})
    print_results(folder, Progress("json", steps=7), last=7)
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    (warning,) = [event["message"] for event in events if event["event"] == "warning"]
    assert warning.startswith("in 5 steps in a row, up to step 7, every group had equal rewards")
    assert events[-1]["event"] == "end"
