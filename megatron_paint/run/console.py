"""What a run prints while it runs. Only rank 0 has a Progress that is not silent."""

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_paint.base.json_text import to_json
from megatron_paint.evaluation.statistics import length_text, paired_difference
from megatron_paint.records import EvalReport, StepReport
from megatron_paint.run.tensorboard import TensorBoardLog

Mode = Literal["normal", "quiet", "json", "silent"]
RECENT = 20  # the time left is estimated from so many steps
LOG_WIDTH = 120  # of the table if the console is a file


class Progress:
    """Console and TensorBoard of one run.

    normal: a line per step, and a table at the end. quiet: warnings and the table. json: one JSON object per event on
    stdout, with `event` one of note, result, step, evaluation, warning, end. silent: nothing, for ranks above 0.
    """

    def __init__(
        self,
        mode: Mode,
        *,
        steps: int,
        console: Console | None = None,
        tensorboard: TensorBoardLog | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.mode = mode
        self.steps = steps
        self.console = console or Console(highlight=False)
        if not self.console.is_terminal:
            self.console.width = LOG_WIDTH
        self.tensorboard = tensorboard
        self._clock = clock
        self._times: deque[float] = deque([clock()], maxlen=RECENT + 1)
        self._accuracy: float | None = None

    def note(self, message: str, **values: Any) -> None:
        """Prints a line that is neither a step nor a warning. `values` go into the JSON event."""
        self._emit("note", {"message": message, **values}, "" if self.mode == "quiet" else escape(message))

    def result(self, message: str, **values: Any) -> None:
        """Prints a result of the run, also in quiet mode."""
        self._emit("result", {"message": message, **values}, escape(message))

    def warn(self, message: str) -> None:
        """Prints a warning."""
        self._emit("warning", {"message": message}, f"[bold yellow]warning:[/] {escape(message)}")

    def start_clock(self) -> None:
        """Starts to measure steps now: after the start, or after a pause that does not belong to a step."""
        self._times.clear()
        self._times.append(self._clock())

    def step(self, report: StepReport) -> None:
        """Prints one step and its warnings."""
        self._times.append(self._clock())
        left = self.seconds_left(report.step)
        line = "" if self.mode == "quiet" else self._step_line(report, left)
        self._emit("step", {**report.metrics, "steps": self.steps, "seconds_left": left}, line)
        for warning in report.warnings:
            self.warn(warning)
        if self.tensorboard is not None and self.mode != "silent":
            self.tensorboard.add(report.step, report.metrics)

    def evaluation(self, report: EvalReport) -> None:
        """Prints one evaluation. The lines of later steps repeat its accuracy."""
        self._accuracy = report.metrics["avg"]
        values = {"step": report.step, "benchmark": report.benchmark, **report.metrics}
        line = f"[bold]evaluation[/] at step {report.step} on {escape(report.benchmark)}: {accuracy_text(report)}"
        self._emit("evaluation", values, "" if self.mode == "quiet" else line)
        if self.tensorboard is not None and self.mode != "silent":
            scores = {f"eval/{report.benchmark}/{name}": value for name, value in report.metrics.items()}
            self.tensorboard.add(report.step, scores)

    def end(self, *, before: Sequence[EvalReport] = (), after: Sequence[EvalReport] = (), folder: str = "") -> None:
        """Prints the end of the run: each benchmark before and after, and the folder of the results."""
        differences = {}
        for old, new in zip(before, after, strict=True) if before else ():
            difference = paired_difference(before=old, after=new)
            differences[new.benchmark] = [difference.mean, difference.low, difference.high]
        values = {"folder": folder, "differences": differences}
        values["after"] = {report.benchmark: report.metrics for report in after}
        self._emit("end", values, end_table(before, after) if after else "")
        if folder and self.mode in ("normal", "quiet"):
            self.console.print(f"Results: {escape(folder)}", soft_wrap=True)
        if self.tensorboard is not None:
            self.tensorboard.close()

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
        for name, key in (("overlap", "overlap/mean"), ("reveal", "reveal/mean"), ("reward", "reward/mean")):
            if not math.isnan(metrics.get(key, math.nan)):  # only some objectives have it
                parts.append(f"{name} {metrics[key]:.2f}")
        if self._accuracy is not None:
            parts.append(f"accuracy {100 * self._accuracy:.1f} %")
        parts += [f"{metrics['tokens_per_second']:,.0f} tokens/s", f"{duration(left)} left"]
        return "  ".join(parts)

    def _emit(self, event: str, values: Mapping[str, Any], rendered: "str | Table") -> None:
        if self.mode == "silent" or (self.mode != "json" and rendered == ""):
            return
        if self.mode == "json":
            # rich would wrap and colour the line.
            print(to_json({"event": event, **values}), file=self.console.file, flush=True)
        else:
            self.console.print(rendered, soft_wrap=isinstance(rendered, str))


def accuracy_text(report: EvalReport) -> str:
    """Avg@n with its interval, in per cent."""
    metrics = report.metrics
    low, high = 100 * metrics["avg/low"], 100 * metrics["avg/high"]
    return f"Avg@{report.samples_per_problem} {100 * metrics['avg']:.1f} % [{low:.1f}, {high:.1f}]".replace("[", r"\[")


def end_table(before: Sequence[EvalReport], after: Sequence[EvalReport]) -> Table:
    """Before and after the run: accuracy with its interval, the paired difference, greedy accuracy and mean length."""
    table = Table(title="Accuracy in %, with 95 % intervals over problems")
    for name in ("benchmark", "model", "accuracy", "difference (paired)", "greedy", "mean length"):
        table.add_column(name, justify="left" if name in ("benchmark", "model") else "right")
    pairs = zip(before, after, strict=True) if before else ((None, new) for new in after)
    for old, new in pairs:
        if old is not None:
            table.add_row(escape(old.benchmark), f"step {old.step}", accuracy_text(old), "", *_greedy_and_length(old))
        difference = "" if old is None else _difference_text(old, new)
        table.add_row(
            escape(new.benchmark), f"step {new.step}", accuracy_text(new), difference, *_greedy_and_length(new)
        )
    return table


def _greedy_and_length(report: EvalReport) -> tuple[str, str]:
    greedy = f"{100 * report.metrics['greedy']:.1f}" if "greedy" in report.metrics else "-"
    return greedy, length_text(report.metrics)


def _difference_text(old: EvalReport, new: EvalReport) -> str:
    found = paired_difference(before=old, after=new)
    return rf"{100 * found.mean:+.1f} \[{100 * found.low:+.1f}, {100 * found.high:+.1f}]"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds as h:mm:ss."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
