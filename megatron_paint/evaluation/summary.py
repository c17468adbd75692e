"""Writes the results of an evaluation as JSON for programs, Markdown for readers and a plot. Reads reports again."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_paint.base.counts import agreeing, count_text
from megatron_paint.base.errors import UserError
from megatron_paint.base.json_text import to_json
from megatron_paint.evaluation.statistics import Interval, domains_in, length_text, macro_average, problem_scores
from megatron_paint.records import Asked, EvalReport, Graded
from megatron_paint.runtime.files import disk_errors, write_atomically

SUMMARY = "summary.json"
TRUNCATED_LIMIT = 0.1  # share of answers that are cut off, above which an accuracy says little; ours


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """The reports of one model on several benchmarks."""

    model: str  # its path, the title of the summary
    reports: tuple[EvalReport, ...]  # one for each benchmark
    sampled_with: Mapping[str, Any]  # the settings of sampling, which summary.json repeats

    @property
    def macro(self) -> Interval:
        """The mean of the benchmarks' Avg@n, in [0, 1], with its 95 % interval over problems."""
        return macro_average(self.reports)


def write_summary(out: Path, evaluated: Evaluated) -> None:
    """Writes `summary.json`, `summary.md`, `summary.png`, and all answers of each benchmark in `BENCHMARK.json`.

    Raises UserError if writing fails.
    """
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        for report in evaluated.reports:
            write_atomically(out / f"{report.benchmark}.json", to_json(asdict(report), indent=1) + "\n")
        summary = {
            "model": evaluated.model,
            "sampled_with": dict(evaluated.sampled_with),
            "macro": asdict(evaluated.macro),
            "benchmarks": {report.benchmark: _of(report) for report in evaluated.reports},
        }
        write_atomically(out / SUMMARY, to_json(summary, indent=1) + "\n")
        write_atomically(out / "summary.md", markdown(evaluated))
        plot(out / "summary.png", evaluated)


def truncation_warning(report: EvalReport) -> str | None:
    """A warning if more than a tenth of the answers ended at the length limit; None otherwise."""
    share = report.metrics["truncated_share"]
    if not share > TRUNCATED_LIMIT:
        return None
    return (
        f"{report.benchmark}: {100 * share:.0f} % of the answers are cut off at the length limit, and such an answer "
        "usually counts as wrong. Raise evaluation.max_new_tokens; if the answers only repeat themselves, look at the "
        "samples"
    )


def domain_text(report: EvalReport) -> str:
    """The accuracy of each domain, in per cent; an empty text if all problems are of one domain."""
    return ", ".join(
        f"{name} {100 * report.metrics[f'domain/{name}/avg']:.1f} %" for name in domains_in(report.metrics)
    )


def error_warning(report: EvalReport) -> str | None:
    """A warning if graders failed on answers; None otherwise."""
    failed = [answer for answer in report.answers if answer.outcome == "error"]
    if not failed:
        return None
    return (
        f"{report.benchmark}: {len(failed):,} of {count_text(len(report.answers), 'answer')} "
        f"{agreeing(len(failed), 'has no verdict and counts', 'have no verdict and count')} as not right, because "
        f"their grader failed. The first is of problem {failed[0].problem_id!r}: {failed[0].error}"
    )


def _of(report: EvalReport) -> dict[str, Any]:
    return {"problems": report.num_problems, "samples": report.samples_per_problem, **report.metrics}


def markdown(evaluated: Evaluated) -> str:
    """Returns a Markdown table of the benchmarks: shares in per cent, with 95 % intervals over problems."""
    lines = [
        f"# {evaluated.model}",
        "",
        "Shares in %, with 95 % intervals over the draw of problems. Box in thought: how many responses end inside a",
        "thought that holds a box; by default it is no answer (grading.box_in_thought).",
        "",
        "| benchmark | problems | Avg@n | interval | pass@n | maj@n | truncated | no box "
        "| box in thought | time-outs | errors | mean tokens |",
        "|---|---:|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for report in evaluated.reports:
        metrics, n = report.metrics, report.samples_per_problem
        values = [metrics["avg"], metrics[f"pass@{n}"], metrics[f"maj@{n}"], metrics["truncated_share"]]
        avg, best, majority, truncated = (f"{100 * value:.1f}" for value in values)
        lines.append(
            f"| {report.benchmark} | {report.num_problems} | {avg} (n = {n}) "
            f"| {100 * metrics['avg/low']:.1f} to {100 * metrics['avg/high']:.1f} | {best} | {majority} | {truncated} "
            f"| {100 * metrics['no_answer_share']:.1f} | {metrics['box_in_thought']:.0f} | {metrics['timeouts']:.0f} "
            f"| {metrics.get('errors', 0):.0f} | {length_text(metrics)} |"
        )
    lines += _domain_lines(evaluated.reports)
    lines += [
        f"\nWarning: {warning}."
        for report in evaluated.reports
        for warning in (truncation_warning(report), error_warning(report))
        if warning is not None
    ]
    if len(evaluated.reports) > 1:
        macro = evaluated.macro
        lines += [
            "",
            f"Macro average {100 * macro.mean:.1f}, 95 % interval {100 * macro.low:.1f} to {100 * macro.high:.1f}.",
        ]
    return "\n".join(lines) + "\n"


def _domain_lines(reports: Sequence[EvalReport]) -> list[str]:
    """The table of accuracies by domain, for the benchmarks with several domains."""
    rows = []
    for report in reports:
        for name in domains_in(report.metrics):
            problems, avg, low, high = (
                report.metrics[f"domain/{name}/{key}"] for key in ("problems", "avg", "avg/low", "avg/high")
            )
            rows.append(
                f"| {report.benchmark} | {name} | {problems:.0f} | {100 * avg:.1f} "
                f"| {100 * low:.1f} to {100 * high:.1f} |"
            )
    return (
        ["", "| benchmark | domain | problems | Avg@n | interval |", "|---|---|---:|---:|---|", *rows] if rows else []
    )


def plot(path: Path, evaluated: Evaluated) -> None:
    """Draws Avg@n of each benchmark with its interval, and pass@n."""
    from matplotlib.figure import Figure

    names = [report.benchmark for report in evaluated.reports]
    metrics = [report.metrics for report in evaluated.reports]
    heights = [100 * m["avg"] for m in metrics]
    below = [100 * (m["avg"] - m["avg/low"]) for m in metrics]
    above = [100 * (m["avg/high"] - m["avg"]) for m in metrics]
    figure = Figure(figsize=(1.5 + 1.2 * len(names), 3.5), layout="constrained")
    axes = figure.subplots()
    axes.bar(names, heights, yerr=[below, above], capsize=4, color="tab:blue", label="Avg@n, 95 % interval")
    best = [100 * r.metrics[f"pass@{r.samples_per_problem}"] for r in evaluated.reports]
    axes.plot(names, best, "k_", markersize=18, label="pass@n")
    axes.set(ylim=(0, 105), ylabel="right answers in %", title=Path(evaluated.model).name)
    axes.legend()
    figure.savefig(path, dpi=150)


def read_reports(path: Path) -> tuple[EvalReport, ...]:
    """Reads the reports of an evaluation's folder, or one report file, such as those in a run folder's eval/.

    Raises UserError that names the file that cannot be read.
    """
    files = [path]
    if not path.exists():
        raise UserError(f"there is no evaluation {path}: give the folder that evaluate wrote (--out)")
    if path.is_dir():
        try:
            files = [path / f"{name}.json" for name in list(_summary(path)["benchmarks"])]
        except (KeyError, TypeError) as error:
            raise UserError(f"{path} has no evaluation: {SUMMARY} names no benchmarks") from error
    return tuple(map(read_report, files))


def read_sampled_with(path: Path) -> dict[str, Any]:
    """Returns the recorded sampling settings of an evaluation's folder. A single report file has none."""
    return dict(_summary(path).get("sampled_with") or {}) if path.is_dir() else {}


def read_model(folder: Path) -> str:
    """Returns the name of the model in an evaluation's folder."""
    return str(_summary(folder).get("model", "not recorded"))


def _summary(folder: Path) -> dict[str, Any]:
    try:
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder} has no evaluation: {SUMMARY} cannot be read ({error})") from error
    if not isinstance(summary, dict):
        raise UserError(f"{folder} has no evaluation: {SUMMARY} is not a JSON object")
    return summary


def read_report(file: Path) -> EvalReport:
    """Reads one report. Raises UserError if it cannot be read."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        answers = tuple(Graded(**answer) for answer in content["answers"])
        problems = tuple(Asked(**problem) for problem in content.get("problems", ()))  # earlier versions wrote none
        report = EvalReport(**{**content, "answers": answers, "problems": problems})
        problem_scores(report)
        return report
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"cannot read the evaluation {file}: {error}") from error
