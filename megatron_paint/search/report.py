"""The report of a search: report.md for readers, report.json for programs, report.png, and best.yaml for `train`."""

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from megatron_paint.base.counts import count_text
from megatron_paint.base.json_text import to_json
from megatron_paint.base.keys import derive_key, uniforms
from megatron_paint.config.saved import to_yaml
from megatron_paint.config.tree import settings_tree
from megatron_paint.evaluation.statistics import LEVEL, Interval, paired_difference
from megatron_paint.records import EvalReport
from megatron_paint.run.folder import RunFolder
from megatron_paint.runtime.files import write_atomically
from megatron_paint.search.final import FinalComparison, Problems
from megatron_paint.search.space import Space, with_values
from megatron_paint.search.study import SearchStudy, TrialRecord, importance_of
from megatron_paint.search.text import chosen_text, p_text, value_text, with_interval
from megatron_paint.search.trial_run import trial_folder
from megatron_paint.search.worker import best_of

RESAMPLES = 200  # of the trials, for the intervals of the importances; ours
BEST = "best.yaml"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A trial with its last accuracy."""

    trial: TrialRecord
    step: int | None  # of the accuracy; None: no evaluation yet
    accuracy: Interval | None
    difference: Interval | None  # from trial 0 at the same step, paired by problem; None: not known, or trial 0 itself


@dataclass(frozen=True, kw_only=True)
class Importance:
    """The share of one parameter in the importance of all, with its interval."""

    key: str
    share: Interval


@dataclass(frozen=True, kw_only=True)
class SearchReport:
    """Everything that a search has found."""

    seed: int
    trials: tuple[Measured, ...]
    best: Measured | None  # None: no trial is complete
    importances: tuple[Importance, ...]  # the largest first; empty where too few trials are complete
    final: FinalComparison | None


def build_report(out: Path, study: SearchStudy, *, seed: int, final: FinalComparison | None) -> SearchReport:
    """The report of the trials so far."""
    trials = study.trials()
    measured = tuple(_measured(out, trial) for trial in trials)
    complete = [trial for trial in trials if trial.state == "complete"]
    best = measured[best_of(complete, study.space.settings.budget.steps).number] if complete else None
    return SearchReport(
        seed=seed, trials=measured, best=best, importances=importances(study, complete, seed=seed), final=final
    )


def importances(study: SearchStudy, complete: Sequence[TrialRecord], *, seed: int) -> tuple[Importance, ...]:
    """Importances with percentile intervals over resampled trials."""
    shares = study.importance()
    if not shares:
        return ()
    numbers = np.array([trial.number for trial in complete])
    draws = [
        sorted(numbers[(uniforms(derive_key(seed, "importance", draw), len(numbers)) * len(numbers)).astype(int)])
        for draw in range(RESAMPLES)
    ]
    found = [importance_of(drawn) for drawn in study.bootstrap_studies(draws)]
    result = []
    for key, share in shares.items():
        values = [one[key] for one in found if key in one]
        low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) if values else (0.0, 1.0)
        result.append(Importance(key=key, share=Interval(share, float(low), float(high))))
    return tuple(sorted(result, key=lambda one: -one.share.mean))


def write_report(out: Path, space: Space, report: SearchReport, problems: Problems) -> None:
    """Writes report.md, report.json and report.png and, once a trial is complete, best.yaml."""
    write_atomically(out / "report.json", to_json(asdict(report), indent=1) + "\n")
    write_atomically(out / "report.md", markdown(out, space, report, problems))
    if report.best is not None:
        write_atomically(out / BEST, best_yaml(out, space, report.best))
        write_atomically(out / "report.png", plot(report))


def best_yaml(out: Path, space: Space, best: Measured) -> str:
    """The given settings with the values of the best trial, for a run of their own length and evaluation."""
    tree = with_values(settings_tree(space.given), best.trial.chosen)
    tree["run"]["dir"] = str(out / "best")
    head = (
        f"# megatron-paint train {out / BEST}\n#\n# The given settings with the values of trial {best.trial.number}: "
    )
    return f"{head}\n# {chosen_text(best.trial.chosen)}\n{to_yaml(tree)}"


def markdown(out: Path, space: Space, report: SearchReport, problems: Problems) -> str:
    """The report for readers."""
    budget, states = space.settings.budget, [measured.trial.state for measured in report.trials]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    lines = [
        f"# Search in {out}",
        "",
        f"{count_text(len(states), 'trial')} ({counts}) of {count_text(budget.steps, 'step')}, evaluated every "
        f"{budget.evaluate_every}; seed {report.seed}. Trial 0 is the given settings. Trials are chosen and pruned by "
        f"their accuracy on {count_text(len(problems.validation.problems), 'problem')} of "
        f"`{space.settings.validation.problems}`. Accuracies are Avg@n in %, with 95 % intervals over the draw of "
        "problems. The intervals do not cover another seed of training.",
        "",
        *_best_lines(space, report),
        *_final_lines(space, report),
        *_importance_lines(report),
        *_trial_lines(space, report),
    ]
    return "\n".join(lines) + "\n"


def _best_lines(space: Space, report: SearchReport) -> list[str]:
    if report.best is None:
        return ["No trial is complete yet.", ""]
    best = report.best
    lines = ["## Best settings", ""]
    lines.append(f"Trial {best.trial.number}: {with_interval(best.accuracy)} %. `{BEST}` has these settings.")
    if best.difference is not None:
        lines.append(f"Against trial 0, paired by problem: {with_interval(best.difference, sign=True)} points.")
        lines.append("The best of many trials looks better than it is: only other problems show by how much.")
    lines += ["", "| setting | given | best |", "|---|---|---|"]
    default = space.default
    for key, value in best.trial.chosen.items():
        given = value_text(default[key]) if key in default else "-"
        lines.append(f"| `{key}` | {given} | {value_text(value)} |")
    return [*lines, ""]


def _final_lines(space: Space, report: SearchReport) -> list[str]:
    name = space.given.evaluation.problems
    lines = ["## On other problems", ""]
    if name is None:
        return [*lines, "Not compared: evaluation.problems of the given settings is null.", ""]
    if report.best is not None and report.best.trial.number == 0:
        return [*lines, "Nothing to compare: the given settings are the best trial.", ""]
    if (final := report.final) is None:
        return [*lines, f"Not compared yet: it follows the last trial, on `{name}`.", ""]
    return [
        *lines,
        f"{count_text(final.problems, 'problem')} of `{name}`, which no trial was chosen by:",
        "",
        "| | accuracy |",
        "|---|---|",
        f"| given settings (trial 0) | {with_interval(final.default_accuracy)} |",
        f"| best (trial {final.best}) | {with_interval(final.best_accuracy)} |",
        f"| difference, paired by problem | {with_interval(final.difference, sign=True)}; p {p_text(final.p_value)} |",
        "",
    ]


def _importance_lines(report: SearchReport) -> list[str]:
    lines = ["## Importance", ""]
    if not report.importances:
        return [*lines, "Not computed: fewer than four trials are complete, or all are equally good.", ""]
    return [
        *lines,
        "PED-ANOVA (arXiv 2304.10255): where the best tenth of the complete trials lies, compared with all of them. "
        f"Shares sum to 1. 95 % intervals over {RESAMPLES} resamplings of the trials. A setting that not every trial "
        "varies (`when`) is compared among the trials that have it.",
        "",
        "| setting | importance | interval |",
        "|---|---:|---|",
        *(
            f"| `{one.key}` | {one.share.mean:.2f} | {one.share.low:.2f} to {one.share.high:.2f} |"
            for one in report.importances
        ),
        "",
    ]


def _trial_lines(space: Space, report: SearchReport) -> list[str]:
    keys = [parameter.key for parameter in space.parameters]
    lines = ["## Trials", "", "Differences are from trial 0 at the same step, paired by problem.", ""]
    lines.append(f"| trial | state | step | accuracy | difference | {' | '.join(f'`{key}`' for key in keys)} |")
    lines.append(f"|---:|---|---:|---|---|{'---|' * len(keys)}")
    for measured in report.trials:
        trial = measured.trial
        values = [value_text(trial.chosen[key]) if key in trial.chosen else "" for key in keys]
        accuracy = "" if measured.accuracy is None else with_interval(measured.accuracy)
        difference = "" if measured.difference is None else with_interval(measured.difference, sign=True)
        step = "" if measured.step is None else str(measured.step)
        lines.append(" | ".join([f"| {trial.number}", trial.state, step, accuracy, difference, *values]) + " |")
    failed = [measured.trial for measured in report.trials if measured.trial.reason]
    return [*lines, "", *(f"* Trial {trial.number} failed: {trial.reason}" for trial in failed)]


def plot(report: SearchReport) -> bytes:
    """A picture (PNG) of the accuracy of each trial with its interval, and of the best one so far."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for state, colour in (("complete", "tab:blue"), ("pruned", "tab:gray")):
        shown = [one for one in report.trials if one.trial.state == state and one.accuracy is not None]
        if shown:
            heights = [100 * one.accuracy.mean for one in shown]
            spread = [
                [100 * (one.accuracy.mean - one.accuracy.low) for one in shown],
                [100 * (one.accuracy.high - one.accuracy.mean) for one in shown],
            ]
            numbers = [one.trial.number for one in shown]
            axes.errorbar(numbers, heights, yerr=spread, fmt="o", capsize=3, color=colour, label=state)
    complete = [one for one in report.trials if one.trial.state == "complete"]
    best = np.maximum.accumulate([100 * one.accuracy.mean for one in complete])
    axes.step([one.trial.number for one in complete], best, where="post", color="tab:orange", label="best so far")
    axes.set(xlabel="trial (0: the given settings)", ylabel="validation Avg@n in %")
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    return picture.getvalue()


def _measured(out: Path, trial: TrialRecord) -> Measured:
    folder, step = RunFolder(trial_folder(out, trial.number)), trial.last_step
    if step is None:
        return Measured(trial=trial, step=None, accuracy=None, difference=None)
    report = folder.read_eval(step)
    metrics = report.metrics
    accuracy = Interval(metrics["avg"], metrics["avg/low"], metrics["avg/high"])
    return Measured(trial=trial, step=step, accuracy=accuracy, difference=_from_default(out, trial.number, report))


def _from_default(out: Path, number: int, report: EvalReport) -> Interval | None:
    default = RunFolder(trial_folder(out, 0))
    if number == 0 or report.step not in default.evaluated_steps():
        return None
    return paired_difference(before=default.read_eval(report.step), after=report)
