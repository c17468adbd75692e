"""Compares two evaluations. Only paired differences over the same problems can show that two models differ."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from megatron_paint.evaluation.statistics import (
    Interval,
    macro_average,
    macro_difference,
    paired_differences,
    sign_flip_p_value,
)
from megatron_paint.evaluation.summary import read_model, read_reports, read_sampled_with
from megatron_paint.records import EvalReport

MACRO = "macro average"


@dataclass(frozen=True, kw_only=True)
class Compared:
    """The comparison of one benchmark or of the macro average."""

    benchmark: str
    problems: int
    samples: tuple[int, int]  # answers to each problem of A and of B; of the macro average: the most
    a: float  # mean score of A, in [0, 1]
    b: float
    difference: Interval  # B minus A
    p_value: float  # chance of a difference at least this large if the two models were equal


def compare_files(a: Path, b: Path) -> list[Compared]:
    """Compares two folders of evaluations or two report files.

    Raises UserError if their benchmarks or problems differ, or if a file cannot be read.
    """
    return compare(read_reports(a), read_reports(b))


def compare(a: Sequence[EvalReport], b: Sequence[EvalReport]) -> list[Compared]:
    """Compares each benchmark in the order of `a`. If there are several, the last row is the macro average."""
    by_name = {report.benchmark: report for report in b}
    b = [by_name[report.benchmark] for report in a] if by_name.keys() == {r.benchmark for r in a} else b
    macro = _compare(MACRO, a, b)  # raises UserError if benchmarks or problems differ
    rows = [_compare(one.benchmark, [one], [other]) for one, other in zip(a, b, strict=True)]
    return [*rows, macro] if len(rows) > 1 else rows


def sampled_otherwise(a: Path, b: Path) -> list[str]:
    """Returns the recorded settings, other than the model, in which the two evaluations differ; one text for each."""
    ours, theirs = read_sampled_with(a), read_sampled_with(b)
    shared = sorted((ours.keys() & theirs.keys()) - {"model", "weights", "responses"})
    return [f"{key} {ours[key]} and {theirs[key]}" for key in shared if ours[key] != theirs[key]]


def _compare(name: str, a: Sequence[EvalReport], b: Sequence[EvalReport]) -> Compared:
    groups = paired_differences(before=a, after=b)
    return Compared(
        benchmark=name,
        problems=sum(map(len, groups)),
        samples=(max(r.samples_per_problem for r in a), max(r.samples_per_problem for r in b)),
        a=macro_average(a).mean,
        b=macro_average(b).mean,
        difference=macro_difference(before=a, after=b),
        p_value=sign_flip_p_value(groups, key=name),
    )


def lines(rows: Sequence[Compared]) -> list[list[str]]:
    """Returns the cells of the comparison's table as texts, with shares in per cent."""
    return [
        [
            row.benchmark,
            str(row.problems),
            f"{100 * row.a:.1f}",
            f"{100 * row.b:.1f}",
            f"{100 * row.difference.mean:+.1f} [{100 * row.difference.low:+.1f}, {100 * row.difference.high:+.1f}]",
            f"{row.p_value:.4f}" if row.p_value >= 1e-4 else "< 0.0001",
            str(row.samples[0]) if row.samples[0] == row.samples[1] else f"{row.samples[0]} and {row.samples[1]}",
        ]
        for row in rows
    ]


COLUMNS = ("benchmark", "problems", "A", "B", "B - A (paired)", "p", "n")


def who(a: Path, b: Path) -> list[str]:
    """Returns a line for A and one for B: its folder or file, and the model that was evaluated."""
    return [f"{name} = {path}{_model_text(path)}" for name, path in (("A", a), ("B", b))]


def _model_text(path: Path) -> str:
    if path.is_dir():
        return f", model {read_model(path)}"
    (report,) = read_reports(path)
    return f", step {report.step}" if report.step else ""


def console_table(rows: Sequence[Compared]) -> Table:
    """Returns the comparison as a table for the console."""
    made = Table(title="Shares in %, with 95 % intervals over problems")
    for number, name in enumerate(COLUMNS):
        made.add_column(name, justify="right" if number else "left")
    for row in lines(rows):
        made.add_row(*map(escape, row))
    return made


def markdown(rows: Sequence[Compared], *, a: Path, b: Path) -> str:
    """Returns the comparison as a Markdown table."""
    head = [*(f"* {line}" for line in who(a, b)), ""]
    head += ["Shares in %, 95 % intervals over problems, p by sign flips of problems. n: answers to each problem.", ""]
    body = ["| " + " | ".join(row) + " |" for row in lines(rows)]
    return "\n".join([*head, "| " + " | ".join(COLUMNS) + " |", "|---|---:|---:|---:|---|---:|---:|", *body]) + "\n"
