"""The final comparison: the best trial with the given settings, on problems that no trial was chosen by."""

import os
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_paint.base.counts import count_text
from megatron_paint.base.errors import UserError
from megatron_paint.config.saved import to_yaml
from megatron_paint.config.tree import settings_tree
from megatron_paint.evaluation.benchmarks import Benchmark, load_benchmark
from megatron_paint.evaluation.statistics import (
    Interval,
    macro_average,
    macro_difference,
    paired_differences,
    sign_flip_p_value,
)
from megatron_paint.evaluation.summary import SUMMARY, read_reports
from megatron_paint.run.console import Progress
from megatron_paint.run.folder import RunFolder
from megatron_paint.runtime.files import write_atomically
from megatron_paint.runtime.signals import RecordedSignals
from megatron_paint.runtime.stop import STOPPED, STOPPING
from megatron_paint.search.journal import Claim
from megatron_paint.search.space import Space, Value, with_values
from megatron_paint.search.study import CLAIMS, TrialRecord
from megatron_paint.search.trial_run import Place, last_error, start_process, trial_folder
from megatron_paint.search.worker import POLL_SECONDS, best_of

FINAL = "final"
ON = "evaluation.problems"  # the setting with the problems of the final comparison


@dataclass(frozen=True, kw_only=True)
class Problems:
    """The held-out problems of a search."""

    validation: Benchmark  # every trial is measured on them
    test: Benchmark | None  # of the final comparison; None: evaluation.problems is null


@dataclass(frozen=True, kw_only=True)
class FinalComparison:
    """The best trial and trial 0 on the problems of evaluation.problems. Accuracies are shares in [0, 1]."""

    best: int  # number of the trial
    problems: int
    default_accuracy: Interval
    best_accuracy: Interval
    difference: Interval  # best minus default, paired by problem
    p_value: float  # by sign flips of problems


def load_problems(space: Space) -> Problems:
    """The problems of a search. UserError: they cannot be read, or a validation problem is a test problem too."""
    evaluation, validation = space.given.evaluation, space.settings.validation
    domains = space.given.domains
    problems = load_benchmark(validation.problems, replace(evaluation, limit=validation.limit), domains=domains)
    if evaluation.problems is None:
        return Problems(validation=problems, test=None)
    test = load_benchmark(evaluation.problems, evaluation, domains=domains)
    texts = {_plain(problem.problem): problem.id for problem in test.problems}
    both = [problem for problem in problems.problems if _plain(problem.problem) in texts]
    if both:
        raise UserError(
            f"validation.problems={validation.problems}: {len(both)} of "
            f"{count_text(len(problems.problems), 'problem')} are in {ON}={evaluation.problems} too, such as "
            f"{both[0].id!r}, which is {texts[_plain(both[0].problem)]!r} there. A search chooses by the first and "
            f"compares on the second: give other problems, or set {ON}=null to leave the final comparison out"
        )
    return Problems(validation=problems, test=test)


def compare(out: Path, space: Space, trials: list[TrialRecord], *, place: Place, progress: Progress) -> int:
    """Evaluates trial 0 and the best trial on the test problems, unless that is done, and leaves it in OUT/final.

    Another worker that does so already is left alone. Returns 0, or 75 if it was asked to stop: by the first Ctrl-C,
    SIGTERM or SIGUSR1. The answers so far are kept. UserError: an evaluation failed.
    """
    with RecordedSignals(STOPPING) as signals:
        for number in _compared(space, trials):
            if _is_evaluated(out, number):
                continue
            claim = Claim(out / CLAIMS / f"final_{number:04d}")
            if not claim.take():
                progress.note(f"another worker evaluates trial {number} on {ON}")
                continue
            try:
                progress.note(f"final comparison: trial {number} on {ON}={space.given.evaluation.problems}")
                _evaluate(out, number, space, trials[number].chosen, place, signals)
            finally:
                claim.release()
            if signals.count:
                progress.on_stderr(
                    f"megatron-paint: {signals.signal.name}: the final comparison stops. {out} keeps the answers so "
                    "far, and the same command continues"
                )
                return STOPPED
    return 0


def read_comparison(out: Path, space: Space, trials: list[TrialRecord]) -> FinalComparison | None:
    """What `compare` has left; None: the best trial is trial 0, or an evaluation is missing."""
    numbers = _compared(space, trials)
    if not numbers or not all(_is_evaluated(out, number) for number in numbers):
        return None
    default, best = (list(read_reports(_folder(out, number))) for number in numbers)
    differences = paired_differences(before=default, after=best)
    return FinalComparison(
        best=numbers[1],
        problems=sum(report.num_problems for report in best),
        default_accuracy=macro_average(default),
        best_accuracy=macro_average(best),
        difference=macro_difference(before=default, after=best),
        p_value=sign_flip_p_value(differences, key="search"),
    )


def _compared(space: Space, trials: list[TrialRecord]) -> list[int]:
    """Trial 0 and the best one; empty where there is nothing to compare."""
    complete = [trial for trial in trials if trial.state == "complete"]
    if space.given.evaluation.problems is None or not complete or trials[0].state != "complete":
        return []
    best = best_of(complete, space.settings.budget.steps).number
    return [0, best] if best else []


def _folder(out: Path, number: int) -> Path:
    return out / FINAL / f"{number:04d}"


def _is_evaluated(out: Path, number: int) -> bool:
    return (_folder(out, number) / SUMMARY).is_file()


def _evaluate(
    out: Path, number: int, space: Space, chosen: Mapping[str, Value], place: Place, signals: RecordedSignals
) -> None:
    """`megatron-paint evaluate` of a trial's export with its settings, in processes like those of its run.

    A recorded signal ends it. UserError: it failed otherwise.
    """
    folder = _folder(out, number)
    model = RunFolder(trial_folder(out, number)).hf_folder(space.settings.budget.steps)
    settings = folder.with_suffix(".yaml")
    write_atomically(settings, to_yaml(with_values(settings_tree(space.given), chosen)))
    command = ["evaluate", str(settings), "--model", str(model), "--out", str(folder), *place.options]
    log = folder.with_suffix(".log")
    process, status = start_process(command, place, log), None
    try:
        while (status := process.poll()) is None and not signals.count:
            time.sleep(POLL_SECONDS)
    finally:  # each answer is on disk already
        if status is None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if status and not signals.count:
        raise UserError(f"the evaluation of trial {number} ended with exit status {status}: {last_error(log)} ({log})")


def _plain(text: str) -> str:
    return " ".join(text.split())
