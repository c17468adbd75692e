"""What a run prints while it runs. Only rank 0 has a Progress that is not silent."""

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_paint.base.errors import UserError
from megatron_paint.base.json_text import to_json
from megatron_paint.config.secrets import without_secret_arguments
from megatron_paint.evaluation.statistics import Interval, length_text, paired_difference
from megatron_paint.evaluation.summary import domain_text, error_warning, truncation_warning
from megatron_paint.records import EvalReport, StepReport
from megatron_paint.run.console_log import ConsoleLog
from megatron_paint.run.live_line import duration, live_line, plain_lines

Mode = Literal["normal", "quiet", "json", "silent"]
RECENT = 20  # the time left is estimated from so many steps
LOG_WIDTH = 120  # of the table if the console is a file
STEP_LINE = {  # parts of a step's line, in this order, by what they show
    "overlap {:.2f}": "overlap/mean",
    "reveal {:.2f}": "reveal/mean",
    "reward {:.2f}": "reward/mean",
    "kept {:.0f}": "rollout/kept",
    "length {:,.0f}": "response/length_mean",
    "truncated {:.0%}": "response/truncated_share",
    "grad {:.3g}": "grad_norm",
}


class Progress:
    """The console of one run.

    log_every: the console has the line of each step at a multiple of it, and that of the first and last one. The log
    has all.

    normal: a line per step, and a table at the end. quiet: warnings and the table. json: one JSON object per event on
    stdout, with `event` one of note, result, step, evaluation, warning, end. silent: nothing, for ranks above 0.
    """

    def __init__(
        self,
        mode: Mode,
        *,
        steps: int,
        console: Console | None = None,
        log: ConsoleLog | None = None,
        log_every: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.mode = mode
        self.steps = steps
        self.console = console or Console(highlight=False, emoji=False)
        if not self.console.is_terminal:
            self.console.width = LOG_WIDTH
        self.log, self.log_every = log, log_every
        if log is not None:
            log.on_failure = self.warn
        self._clock = clock
        self._times: deque[float] = deque([clock()], maxlen=RECENT + 1)

    def note(self, message: str, **values: Any) -> None:
        """Prints a line that is neither a step nor a warning. `values` go into the JSON event."""
        self._emit("note", {"message": message, **values}, escape(message), quiet=False)

    def result(self, message: str, **values: Any) -> None:
        """Prints a result of the run, also in quiet mode."""
        self._emit("result", {"message": message, **values}, escape(message))

    def warn(self, message: str) -> None:
        """Prints a warning."""
        self._emit("warning", {"message": message}, f"[bold yellow]warning:[/] {escape(message)}")

    def on_stderr(self, line: str) -> None:
        """Prints a line on stderr: an error, or an answer to a signal."""
        print(line, file=sys.stderr, flush=True)
        if self.log is not None:
            self.log.add(escape(line))

    @contextmanager
    def logging(self, logs: Path, arguments: Sequence[str]) -> Iterator[None]:
        """Writes everything printed so far and from now on into the log of a run, and the error that ends the block."""
        self.log.open(logs, command=["megatron-paint", *without_secret_arguments(arguments)])
        try:
            yield
        finally:
            self.log.close()

    def start_clock(self) -> None:
        """Starts to measure steps now: after the start, or after a pause that does not belong to a step."""
        self._times.clear()
        self._times.append(self._clock())

    def step(self, report: StepReport) -> None:
        """Prints one step and its warnings."""
        self._times.append(self._clock())
        left = self.seconds_left(report.step)
        values = {**report.metrics, "steps": self.steps, "seconds": report.seconds, "seconds_left": left}
        is_shown = report.step % self.log_every == 0 or report.step in (1, self.steps)
        self._emit("step", values, self._step_line(report, left), quiet=False, shown=is_shown)
        for warning in report.warnings:
            self.warn(warning)

    def evaluation(self, report: EvalReport) -> None:
        """Prints one evaluation, and a warning if too many answers are cut off."""
        values = {"step": report.step, "benchmark": report.benchmark, **report.metrics}
        line = f"[bold]evaluation[/] at step {report.step} on {escape(report.benchmark)}: {accuracy_text(report)}"
        if domains := domain_text(report):
            line += f" ({escape(domains)})"
        self._emit("evaluation", values, line, quiet=False)
        for warning in (truncation_warning(report), error_warning(report)):
            if warning is not None:
                self.warn(warning)

    def end(
        self,
        *,
        before: Sequence[EvalReport] = (),
        after: Sequence[EvalReport] = (),
        folder: str = "",
        model: str | None = None,
    ) -> None:
        """Prints the end: each benchmark before and after, and the folder of the results.

        Their paired difference is left out if the two evaluations have other problems.
        model: the name of the evaluated model; None for a run, whose models are named by their steps.
        """
        differences = {}
        for old, new in zip(before, after, strict=True) if before else ():
            if (difference := _difference(old, new)) is not None:
                differences[new.benchmark] = [difference.mean, difference.low, difference.high]
        values = {"folder": folder, "differences": differences}
        values["after"] = {report.benchmark: report.metrics for report in after}
        if model is not None:
            self._show(f"model: {escape(model)}", quiet=True)
        self._emit("end", values, end_table(before, after, model=model) if after else "")
        if folder:
            self._show(f"Results: {escape(folder)}", quiet=True)

    def seconds_left(self, step: int) -> float:
        """The seconds that the steps after `step` will take, at the mean speed of the last 20."""
        if len(self._times) < 2:
            return 0.0
        pace = (self._times[-1] - self._times[0]) / (len(self._times) - 1)
        return pace * max(self.steps - step, 0)

    def _step_line(self, report: StepReport, left: float) -> str:
        metrics = report.metrics
        width = len(str(self.steps))
        parts = [f"step {report.step:>{width}}/{self.steps}", f"loss {metrics['loss']:.4f}"]
        for text, key in STEP_LINE.items():
            if not math.isnan(value := metrics.get(key, math.nan)):  # only some objectives have it
                parts.append(text.format(value))
        if report.seconds is not None:
            parts.append(f"{report.seconds:.3g} s/step")
        parts += [f"{metrics['tokens_per_second']:,.0f} tokens/s", f"{duration(left)} left"]
        return "  ".join(parts)

    @contextmanager
    def live(self, *, plain: bool = False) -> Iterator[None]:
        """Shows what the run does now, on a terminal and in the normal mode, until the block ends.

        plain: without a terminal, a line about long work every 30 seconds.
        """
        if self.mode != "normal":
            yield
        elif self.console.is_interactive and not self.console.is_dumb_terminal:
            with live_line(self.console, steps=self.steps):
                yield
        elif plain:
            with plain_lines(self.note):
                yield
        else:
            yield

    def _emit(
        self,
        event: str,
        values: Mapping[str, Any],
        rendered: "str | Table",
        *,
        quiet: bool = True,
        shown: bool = True,
    ) -> None:
        """quiet: whether --quiet prints it too. shown: whether the console prints it, besides the log."""
        if self.mode == "json":
            # rich would wrap and colour the line.
            print(to_json({"event": event, **values}), file=self.console.file, flush=True)
        if rendered != "":
            self._show(rendered, quiet=quiet, shown=shown)

    def _show(self, rendered: "str | Table", *, quiet: bool, shown: bool = True) -> None:
        """Prints a text or table. The log has everything, in the form of the normal mode."""
        if shown and (self.mode == "normal" or (self.mode == "quiet" and quiet)):
            self.console.print(rendered, soft_wrap=isinstance(rendered, str))
        if self.log is not None and self.mode != "silent":
            self.log.add(rendered)


def accuracy_text(report: EvalReport) -> str:
    """Avg@n with its interval, in per cent."""
    metrics = report.metrics
    low, high = 100 * metrics["avg/low"], 100 * metrics["avg/high"]
    return f"Avg@{report.samples_per_problem} {100 * metrics['avg']:.1f} % [{low:.1f}, {high:.1f}]".replace("[", r"\[")


def end_table(before: Sequence[EvalReport], after: Sequence[EvalReport], *, model: str | None = None) -> Table:
    """Before and after the run: accuracy with its interval, the paired difference, greedy accuracy, mean length, the
    number of answers to a problem, and the share of answers that are cut off.

    model: None: the model of each row is named by its step; else all rows are of this one.
    """
    table = Table(title="Accuracy in %, with 95 % intervals over problems")
    names = ("benchmark", "model", "accuracy", "difference (paired)", "greedy", "mean length", "n", "truncated")
    if model is not None:
        names = tuple(name for name in names if name not in ("model", "difference (paired)"))
    for name in names:
        table.add_column(name, justify="left" if name in ("benchmark", "model") else "right")
    pairs = zip(before, after, strict=True) if before else ((None, new) for new in after)
    for old, new in pairs:
        for report in (old, new) if old is not None else (new,):
            difference = _difference_text(old, new) if old is not None and report is new else ""
            own = () if model is not None else (f"step {report.step}",)
            compared = () if model is not None else (difference,)
            table.add_row(escape(report.benchmark), *own, accuracy_text(report), *compared, *_further(report))
    return table


def _further(report: EvalReport) -> tuple[str, ...]:
    metrics = report.metrics
    greedy = f"{100 * metrics['greedy']:.1f}" if "greedy" in metrics else "-"
    truncated = f"{100 * metrics['truncated_share']:.1f} %"
    return greedy, length_text(metrics), str(report.samples_per_problem), truncated


def _difference(old: EvalReport, new: EvalReport) -> Interval | None:
    """None: run.allow_changes let the evaluation change, and there is nothing to pair."""
    try:
        return paired_difference(before=old, after=new)
    except UserError:
        return None


def _difference_text(old: EvalReport, new: EvalReport) -> str:
    found = _difference(old, new)
    if found is None:
        return "other problems"
    return rf"{100 * found.mean:+.1f} \[{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
