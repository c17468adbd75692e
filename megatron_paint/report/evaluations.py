"""The evaluations of a run, with their intervals and their differences from the first one."""

import math
from pathlib import Path
from typing import Any

from megatron_paint.base.errors import UserError
from megatron_paint.evaluation.statistics import domains_in, paired_difference
from megatron_paint.evaluation.summary import read_report
from megatron_paint.records import EvalReport
from megatron_paint.run.folder import RunFolder, step_name

Known = dict[Path, tuple[tuple[int, int], dict[str, Any]]]


def read_evaluations(folder: RunFolder, known: Known) -> tuple[list[dict[str, Any]], list[str]]:
    """A row for each evaluation in the order of steps, and a line for each one that cannot be read.

    known: rows of files that did not change since they were read; it is filled. A row has Avg@n and the ends of its
    95 % interval (`avg`, `low`, `high`), and `difference` from the first evaluation, paired by problem.
    """
    rows, notices = [], []
    first: EvalReport | None = None
    for step in folder.evaluated_steps():
        file = folder.path / "eval" / f"{step_name(step)}.json"
        try:
            stamp = _stamp(file)
            if file in known and known[file][0] == stamp:
                rows.append(known[file][1])
                continue
            report = read_report(file)
            if rows and first is None:
                first = read_report(folder.path / "eval" / f"{step_name(rows[0]['step'])}.json")
            row = _row(report, first)
        except (UserError, KeyError, TypeError, AttributeError, ValueError, OSError) as error:
            notices.append(f"eval/{file.name} is left out: {_one_line(error)}")
            continue
        first = first or report
        known[file] = (stamp, row)
        rows.append(row)
    return rows, notices


def _row(report: EvalReport, first: EvalReport | None) -> dict[str, Any]:
    metrics = report.metrics
    row: dict[str, Any] = {
        "step": report.step,
        "benchmark": report.benchmark,
        "problems": report.num_problems,
        "n": report.samples_per_problem,
        "avg": metrics["avg"],
        "low": metrics["avg/low"],
        "high": metrics["avg/high"],
        "greedy": metrics.get("greedy"),
        "pass": metrics.get(f"pass@{report.samples_per_problem}"),
        "maj": metrics.get(f"maj@{report.samples_per_problem}"),
        "truncated": metrics.get("truncated_share"),
        "length": metrics.get("length_mean"),
        "domains": [
            {
                "name": name,
                "avg": metrics[f"domain/{name}/avg"],
                "low": metrics.get(f"domain/{name}/avg/low"),
                "high": metrics.get(f"domain/{name}/avg/high"),
            }
            for name in domains_in(metrics)
        ],
        "difference": None,
    }
    if first is not None:
        try:
            found = paired_difference(before=first, after=report)
            row["difference"] = [found.mean, found.low, found.high]
        except UserError:
            pass  # other problems: there is nothing to compare
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in row.items()}


def _stamp(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_mtime_ns, status.st_size


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
