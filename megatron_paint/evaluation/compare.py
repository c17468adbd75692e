"""Two evaluations side by side: only paired differences over the same problems tell two models apart."""

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
from megatron_paint.evaluation.summary import read_reports, read_sampled_with
from megatron_paint.records import EvalReport

MACRO = "macro average"


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One benchmark, or the macro average: means of both, B minus A with its interval, and the chance of a difference
    at least so large if the two did not differ."""

    benchmark: str
    problems: int
    a: float
    b: float
    difference: Interval
    p_value: float


def compare_files(a: Path, b: Path) -> list[Compared]:
    """Compares two folders of evaluations, or two report files. UserError: of different benchmarks or problems."""
    return compare(read_reports(a), read_reports(b))


def compare(a: Sequence[EvalReport], b: Sequence[EvalReport]) -> list[Compared]:
    """Benchmark by benchmark, in the order of `a`; with several of them the macro average at the end."""
    by_name = {report.benchmark: report for report in b}
    b = [by_name[report.benchmark] for report in a] if by_name.keys() == {r.benchmark for r in a} else b
    macro = _compare(MACRO, a, b)  # where benchmarks or problems differ, this tells it
    rows = [_compare(one.benchmark, [one], [other]) for one, other in zip(a, b, strict=True)]
    return [*rows, macro] if len(rows) > 1 else rows


def sampled_otherwise(a: Path, b: Path) -> list[str]:
    """What else than the model the two evaluations differ in, where their folders say so."""
    ours, theirs = read_sampled_with(a), read_sampled_with(b)
    shared = sorted((ours.keys() & theirs.keys()) - {"model", "weights", "responses"})
    return [f"{key} {ours[key]} and {theirs[key]}" for key in shared if ours[key] != theirs[key]]


def _compare(name: str, a: Sequence[EvalReport], b: Sequence[EvalReport]) -> Compared:
    groups = paired_differences(before=a, after=b)
    return Compared(
        benchmark=name,
        problems=sum(map(len, groups)),
        a=macro_average(a).mean,
        b=macro_average(b).mean,
        difference=macro_difference(before=a, after=b),
        p_value=sign_flip_p_value(groups, key=name),
    )


def lines(rows: Sequence[Compared]) -> list[list[str]]:
    """The comparison as texts, shares in per cent."""
    return [
        [
            row.benchmark,
            str(row.problems),
            f"{100 * row.a:.1f}",
            f"{100 * row.b:.1f}",
            f"{100 * row.difference.mean:+.1f} [{100 * row.difference.low:+.1f}, {100 * row.difference.high:+.1f}]",
            f"{row.p_value:.4f}" if row.p_value >= 1e-4 else "< 0.0001",
        ]
        for row in rows
    ]


COLUMNS = ("benchmark", "problems", "A", "B", "B - A (paired)", "p")


def console_table(rows: Sequence[Compared]) -> Table:
    """The comparison as a table for the console."""
    made = Table(title="Shares in %, with 95 % intervals over problems")
    for number, name in enumerate(COLUMNS):
        made.add_column(name, justify="right" if number else "left")
    for row in lines(rows):
        made.add_row(*map(escape, row))
    return made


def markdown(rows: Sequence[Compared], *, a: Path, b: Path) -> str:
    """The comparison as a Markdown table."""
    head = [f"A = `{a}`, B = `{b}`; shares in %, 95 % intervals over problems, p by sign flips of problems.", ""]
    body = ["| " + " | ".join(row) + " |" for row in lines(rows)]
    return "\n".join([*head, "| " + " | ".join(COLUMNS) + " |", "|---|---:|---:|---:|---|---:|", *body]) + "\n"
