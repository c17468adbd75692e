"""The report: its figures are those of the evaluations, and the intervals of the importances are a bootstrap."""

import math

import numpy as np
import optuna
import pytest

from megatron_paint.base.keys import derive_key, uniforms
from megatron_paint.config.load import load_settings
from megatron_paint.evaluation.benchmarks import Benchmark
from megatron_paint.evaluation.statistics import Interval, build_report, paired_difference
from megatron_paint.records import Graded, Problem
from megatron_paint.run.folder import RunFolder
from megatron_paint.search import report as report_module
from megatron_paint.search.final import FinalComparison, Problems
from megatron_paint.search.report import build_report as search_report
from megatron_paint.search.report import write_report
from megatron_paint.search.study import SearchStudy
from megatron_paint.search.trial_run import trial_folder
from tests.search.spaces import space

PROBLEMS = 20


def evaluation(step: int, right: int):
    """One answer to each problem; the first `right` are right."""
    answers = [
        Graded(
            problem_id=f"p{number}",
            sample_index=0,
            response_text="",
            num_tokens=1,
            finished=True,
            outcome="right" if number < right else "wrong",
            extracted="1",
        )
        for number in range(PROBLEMS)
    ]
    return build_report(step, "validation", answers)


@pytest.fixture
def study(tmp_path):
    """Six trials: 8, 10, 12, 14 right answers in four complete ones, one pruned, one failed."""
    study = SearchStudy(tmp_path, space(tmp_path, pruner={"rule": "none"}), seed=5)
    for number, right in enumerate((8, 10, 12, 14, 2, 0)):
        assert study.take(most=6, patient=True).number == number
        folder = RunFolder(trial_folder(tmp_path, number))
        if number == 5:
            study.end(number, "failed", reason="exit status 2: no such file")
            continue
        for step in (2, 4) if number < 4 else (2,):
            made = evaluation(step, right - (4 - step))
            folder.write_eval(made)
            study.report(number, {step: made.metrics["avg"]})
        study.end(number, "complete" if number < 4 else "pruned")
    return study


def problems(study: SearchStudy) -> Problems:
    one = (Problem(id="p", problem="1+1?", solution="", answer="2"),)
    return Problems(validation=Benchmark(name="validation", problems=one * PROBLEMS), test=None)


def test_figures(study, tmp_path):
    found = search_report(tmp_path, study, seed=5, final=None)
    assert [measured.trial.state for measured in found.trials] == ["complete"] * 4 + ["pruned", "failed"]
    assert found.best.trial.number == 3
    expected = evaluation(4, 14).metrics
    assert found.best.accuracy == Interval(14 / 20, expected["avg/low"], expected["avg/high"])
    assert found.best.difference == paired_difference(before=evaluation(4, 8), after=evaluation(4, 14))
    assert found.best.difference.mean == pytest.approx(6 / 20)
    pruned = found.trials[4]
    assert (pruned.step, pruned.accuracy.mean) == (2, 0.0)
    assert pruned.difference.mean == pytest.approx(-6 / 20)  # from trial 0 at the same step
    assert found.trials[0].difference is None
    assert (found.trials[5].step, found.trials[5].accuracy) == (None, None)


def test_importances(study, tmp_path, monkeypatch):
    """Against Optuna on studies that are made here."""
    monkeypatch.setattr(report_module, "RESAMPLES", 7)
    found = {one.key: one.share for one in search_report(tmp_path, study, seed=5, final=None).importances}
    trials = study._study.trials[:4]

    def shares(numbers) -> dict[str, float]:
        made = optuna.create_study(direction="maximize")
        made.add_trials([trials[number] for number in numbers])
        if len({trial.value for trial in made.trials}) < 2:
            return {}
        return optuna.importance.get_param_importances(made)

    complete = shares(range(4))
    draws = [shares(sorted(int(4 * u) for u in uniforms(derive_key(5, "importance", draw), 4))) for draw in range(7)]
    assert found.keys() == complete.keys()
    for key, share in found.items():
        assert share.mean == pytest.approx(complete[key], abs=1e-12)
        values = [draw[key] for draw in draws if key in draw]
        assert [share.low, share.high] == pytest.approx(list(np.quantile(values, [0.025, 0.975])), abs=1e-12)
    assert math.fsum(share.mean for share in found.values()) == pytest.approx(1)


def test_the_page(study, tmp_path):
    final = FinalComparison(
        best=3,
        problems=240,
        default_accuracy=Interval(0.8, 0.75, 0.85),
        best_accuracy=Interval(0.9, 0.87, 0.93),
        difference=Interval(0.1, 0.06, 0.14),
        p_value=0.0123,
    )
    found = search_report(tmp_path, study, seed=5, final=final)
    write_report(tmp_path, study.space, found, problems(study))
    text = (tmp_path / "report.md").read_text()
    for line in (
        "6 trials (4 complete, 1 pruned, 1 failed) of 4 steps, evaluated every 2; seed 5.",
        "| given settings (trial 0) | 80.0 [75.0, 85.0] |",
        "| best (trial 3) | 90.0 [87.0, 93.0] |",
        "| difference, paired by problem | +10.0 [+6.0, +14.0]; p = 0.0123 |",
        "* Trial 5 failed: exit status 2: no such file",
        "| 0 | complete | 4 | 40.0 [",
        "| `optimizer.lr` | 0.001 | ",
    ):
        assert line in text, line
    settings = load_settings(tmp_path / "best.yaml")
    assert settings.optimizer.lr == found.best.trial.chosen["optimizer.lr"]
    assert settings.run.dir == str(tmp_path / "best")
    assert settings.run.steps == study.space.given.run.steps


def test_before_the_first_end(tmp_path):
    study = SearchStudy(tmp_path, space(tmp_path), seed=5)
    study.take(most=1, patient=True)
    found = search_report(tmp_path, study, seed=5, final=None)
    write_report(tmp_path, study.space, found, problems(study))
    text = (tmp_path / "report.md").read_text()
    assert "No trial is complete yet." in text
    assert "Not computed: fewer than four trials are complete" in text
    assert not (tmp_path / "best.yaml").exists()
