"""The evaluations of a run, with their intervals and their differences from the first one."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_paint.base.errors import UserError
from megatron_paint.evaluation.statistics import domains_in, paired_difference
from megatron_paint.evaluation.summary import read_report
from megatron_paint.records import EvalReport
from megatron_paint.report.answers import answer_pages
from megatron_paint.run.folder import RunFolder, step_name

AddPage = Callable[[str, dict[str, Any]], None]

DAMAGED = (UserError, KeyError, TypeError, AttributeError, ValueError, OSError)  # what reading such a file may raise


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One evaluation of a run, as the report shows it.

    `row` has Avg@n and the ends of its 95 % interval (`avg`, `low`, `high`), and `difference` from the first
    evaluation, paired by problem. `problems` has the rows of the list of answers, see answers.COLUMNS.
    """

    stamp: tuple[int, int]  # of its file
    row: dict[str, Any]
    problems: list[list[Any]]


Known = dict[Path, Evaluation]


def evaluation_file(folder: RunFolder, step: int) -> Path:
    """The file of the evaluation of one step."""
    return folder.path / "eval" / f"{step_name(step)}.json"


def read_evaluations(folder: RunFolder, known: Known, add_page: AddPage | None) -> tuple[list[Evaluation], list[str]]:
    """The evaluations in the order of steps, and a line for each one that cannot be read.

    known: those of files that did not change since they were read; it is filled. add_page: gets the pages of answers.
    """
    found: list[Evaluation] = []
    notices = []
    first: EvalReport | None = None
    for step in folder.evaluated_steps():
        file = evaluation_file(folder, step)
        try:
            stamp = stamp_of(file)
            if add_page is None and file in known and known[file].stamp == stamp:
                found.append(known[file])
                continue
            report = read_report(file)
            if found and first is None:
                first = read_report(evaluation_file(folder, found[0].row["step"]))
            row, pages = _row(report, first), list(answer_pages(report, step))
        except DAMAGED as error:
            notices.append(f"eval/{file.name} is left out: {_one_line(error)}")
            continue
        first = first or report
        known[file] = Evaluation(stamp=stamp, row=row, problems=[row for _, rows, _ in pages for row in rows])
        found.append(known[file])
        for key, _, content in pages if add_page is not None else ():
            add_page(key, content)
    return found, notices


def _row(report: EvalReport, first: EvalReport | None) -> dict[str, Any]:
    metrics = report.metrics
    row: dict[str, Any] = {
        "step": report.step,
        "benchmark": str(report.benchmark),
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


def stamp_of(file: Path) -> tuple[int, int]:
    """What changes when a file is written again. OSError: there is none."""
    status = file.stat()
    return status.st_mtime_ns, status.st_size


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
