"""The loggers of a run: opens those that the settings name, and lets none of them end the run."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

from megatron_paint.base.errors import UserError
from megatron_paint.config.secrets import recorded_tree, without_credentials
from megatron_paint.config.settings import RunSettings, Settings
from megatron_paint.evaluation.benchmarks import benchmark_name
from megatron_paint.records import EvalReport, StepReport
from megatron_paint.run.folder import RunFolder
from megatron_paint.run.loggers.background import CLOSE_SECONDS, OPEN_SECONDS, BackgroundLogger
from megatron_paint.run.loggers.interface import Logger, Outcome, RunInfo
from megatron_paint.run.loggers.samples import sample_table

HERE = "megatron_paint.run.loggers"
CLASSES = {"tensorboard": "TensorBoardLogger", "wandb": "WandbLogger", "mlflow": "MlflowLogger"}
MOST_OF_AN_ERROR = 300  # characters of its line


class Loggers:
    """All loggers of one run. After the first error of one, a warning names the fix, and it gets nothing more.

    note, warn: print a line.
    """

    def __init__(
        self,
        loggers: Sequence[Logger] = (),
        *,
        samples_every: int = 0,
        note: Callable[[str], None] = print,
        warn: Callable[[str], None] = print,
    ) -> None:
        self.samples_every, self._note, self._warn = samples_every, note, warn
        self._direct = [logger for logger in loggers if not logger.in_background]
        self._background = [BackgroundLogger(logger) for logger in loggers if logger.in_background]
        self._is_open = bool(loggers)

    def open(self) -> None:
        """Starts all loggers, and prints where each of them shows the run."""
        self._each(lambda logger: logger.open(), in_background=False)
        for background in self._background:
            background.open()
        deadline = time.monotonic() + OPEN_SECONDS
        for background in self._background:
            background.wait_open(max(0.0, deadline - time.monotonic()))
        self._print_background()

    def step(self, report: StepReport, lines: Sequence[Mapping[str, Any]]) -> None:
        """Logs one step. lines: those of its samples."""
        if not self._is_open:
            return
        step, values = report.step, finite(report.metrics)  # a call that waits must not keep the report in memory
        self._each(lambda logger: logger.metrics(step, values))
        if self.samples_every and (step == 1 or step % self.samples_every == 0):
            table = sample_table(report, lines)
            self._each(lambda logger: logger.samples(step, table))
        self._print_background()

    def evaluation(self, report: EvalReport) -> None:
        """Logs the numbers of one evaluation."""
        step = report.step
        values = finite({f"eval/{report.benchmark}/{name}": value for name, value in report.metrics.items()})
        self._each(lambda logger: logger.metrics(step, values))
        self._print_background()

    def close(self, outcome: Outcome) -> None:
        """Sends what is left. Later calls do nothing."""
        self._each(lambda logger: logger.close(outcome), in_background=False)
        for background in self._background:
            background.close(outcome)
        deadline = time.monotonic() + CLOSE_SECONDS
        for background in self._background:
            background.wait_closed(max(0.0, deadline - time.monotonic()))
        self._print_background()
        self._direct, self._background, self._is_open = [], [], False

    def _each(self, act: Callable[[Logger], str | None], *, in_background: bool = True) -> None:
        for logger in tuple(self._direct):
            try:
                line = act(logger)
            except Exception as error:
                self._direct.remove(logger)
                self._warn(_failure_line(logger, error))
            else:
                if line:
                    self._note(f"{logger.name}: {_one_line(line)}")
        for background in self._background if in_background and self._is_open else ():
            background.call(lambda logger=background.logger: act(logger))

    def _print_background(self) -> None:
        """Prints what happened in the threads. Only the thread of the run prints."""
        for background in tuple(self._background):
            while background.notices:
                self._note(f"{background.logger.name}: {_one_line(background.notices.popleft())}")
            if background.failure is not None:
                self._background.remove(background)
                self._warn(_failure_line(background.logger, background.failure))


def finite(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers, without the key `step`."""
    numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float) and name != "step"}
    return {name: value for name, value in numbers.items() if math.isfinite(value)}


def _failure_line(logger: Logger, error: Exception) -> str:
    if isinstance(error, UserError):  # it has its own fix
        return f"{logger.name}: {_one_line(str(error))}. The run continues without it"
    what = _one_line(f"{type(error).__name__}: {error}")
    return f"{logger.name}: {what.rstrip('.')}. The run continues without it; {logger.fix}"


def _one_line(text: str) -> str:
    line = " ".join(without_credentials(text).split())
    return line if len(line) <= MOST_OF_AN_ERROR else f"{line[:MOST_OF_AN_ERROR]} ..."


def logger_names(run: RunSettings) -> list[str]:
    """The loggers of a run. TensorBoard need not be named."""
    return list(dict.fromkeys([*(["tensorboard"] if run.tensorboard else []), *run.loggers]))


def run_info(settings: Settings, folder: RunFolder, *, start: int) -> RunInfo:
    """What loggers know of the run. start: last step done."""
    results = ["loss"]
    if settings.evaluation.problems is not None:
        results.append(f"eval/{benchmark_name(str(settings.evaluation.problems))}/avg")
    return RunInfo(
        name=settings.run.name,
        project=settings.run.project,
        folder=folder.path.absolute(),
        settings=recorded_tree(settings),
        resume_step=start,
        results=tuple(results),
    )


def open_loggers(
    settings: Settings,
    folder: RunFolder,
    *,
    start: int,
    note: Callable[[str], None],
    warn: Callable[[str], None],
) -> Loggers:
    """The loggers that the settings name, for rank 0. start: last step done."""
    info = run_info(settings, folder, start=start)
    made = [getattr(import_module(f"{HERE}.{name}"), CLASSES[name])(info) for name in logger_names(settings.run)]
    loggers = Loggers(made, samples_every=settings.run.log_samples_every, note=note, warn=warn)
    loggers.open()
    return loggers
