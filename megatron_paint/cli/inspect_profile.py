"""`megatron-paint inspect profile`: the phases of profiled steps on all ranks, and the operators of one rank."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_paint.base.counts import count_text
from megatron_paint.base.errors import UserError
from megatron_paint.base.json_text import to_json
from megatron_paint.run.folder import RunFolder
from megatron_paint.run.timeline import RankTimes, Timeline, read_timeline
from megatron_paint.run.trace import Operator

WIDTH = 120  # of the tables if the output is a file
LONGEST_NAME = 60  # characters of an operator's name; those of kernels have hundreds


def run(options: argparse.Namespace, _: list[str]) -> int:
    """Prints the tables; returns the exit status."""
    if options.top < 1:
        raise UserError(f"--top={options.top} must be at least 1")
    timeline = read_timeline(RunFolder(options.run_dir).timeline_file)
    steps = chosen_steps(timeline, options.step)
    shown = {step: traced_rank(timeline.steps[step], options.rank) for step in steps}
    if options.json:
        print(to_json([step_tree(timeline, step, shown[step], top=options.top) for step in steps]))
        return 0
    console = Console(highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = WIDTH
    for step in steps:
        console.print(phase_table(timeline, step))
        if (rank := shown[step]) is not None:
            console.print(operator_table(rank, top=options.top))
    return 0


def chosen_steps(timeline: Timeline, step: int | None) -> list[int]:
    """All profiled steps, or the one that is asked for. UserError: it was not profiled."""
    if step is not None and step not in timeline.steps:
        there = ", ".join(map(str, timeline.steps))
        raise UserError(f"--step={step} was not profiled; the profiled steps are {there}")
    return list(timeline.steps) if step is None else [step]


def traced_rank(ranks: Sequence[RankTimes], rank: int | None) -> RankTimes | None:
    """The first rank with a trace, if there is one, or the rank that is asked for. UserError: it has none."""
    traced = [one for one in ranks if one.operators is not None and rank in (None, one.rank)]
    if rank is not None and not traced:
        there = ", ".join(str(one.rank) for one in ranks if one.operators is not None) or "no rank has one"
        raise UserError(f"--rank={rank} has no trace of step {ranks[0].step}; ranks with one: {there}")
    return traced[0] if traced else None


def phase_table(timeline: Timeline, step: int) -> Table:
    """A row for each phase: the slowest and the fastest rank, and the share of the step."""
    ranks = timeline.steps[step]
    slowest = max(ranks, key=lambda one: one.seconds)
    table = Table(
        title=f"Step {step} with what follows it: {slowest.seconds:.3f} s on {count_text(len(ranks), 'rank')}"
    )
    table.add_column("phase")
    for name in ("slowest rank, s", "rank", "fastest rank, s", "rank", "share of the step"):
        table.add_column(name, justify="right")
    for row in timeline.rows(step):
        slow, fast = (f"{row.slowest:.4f}", str(row.slowest_rank)), (f"{row.fastest:.4f}", str(row.fastest_rank))
        table.add_row(row.phase, *slow, *fast, f"{100 * row.share:.1f} %")
    return table


def operator_table(rank: RankTimes, *, top: int) -> Table:
    """The operators of each phase that took most time themselves, on one rank."""
    table = Table(title=f"Step {rank.step}, rank {rank.rank}: time in operators, without the operators that they call")
    for name in ("phase", "on", "operator"):
        table.add_column(name)
    for name in ("calls", "s", "share of the phase"):
        table.add_column(name, justify="right")
    seconds = rank.phases()
    for phase in seconds:
        rows = [*_rows(rank.operators.cpu, phase, "CPU", top), *_rows(rank.operators.gpu, phase, "GPU", top)]
        for index, (device, one) in enumerate(rows):
            share = f"{100 * one.seconds / seconds[phase]:.1f} %" if seconds[phase] else "-"
            name = one.name if len(one.name) <= LONGEST_NAME else f"{one.name[: LONGEST_NAME - 3]}..."
            first = "" if index else phase
            table.add_row(first, device, escape(name), f"{one.calls:,}", f"{one.seconds:.4f}", share)
    return table


def _rows(operators: Mapping[str, Sequence[Operator]], phase: str, device: str, top: int) -> list[tuple[str, Operator]]:
    return [(device, one) for one in operators.get(phase, ())[:top]]


def step_tree(timeline: Timeline, step: int, rank: RankTimes | None, *, top: int) -> dict[str, Any]:
    """The tables of one step for --json."""
    operators = None
    if rank is not None:
        devices = {"cpu": rank.operators.cpu, "gpu": rank.operators.gpu}
        operators = {
            device: {phase: [asdict(one) for one in found[:top]] for phase, found in phases.items()}
            for device, phases in devices.items()
        }
    return {
        "step": step,
        "ranks": len(timeline.steps[step]),
        "phases": [asdict(row) for row in timeline.rows(step)],
        "operators_of_rank": None if rank is None else rank.rank,
        "operators": operators,
    }
