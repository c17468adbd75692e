"""What a logger is, and what it gets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

PROJECT = "megatron-paint"  # where neither run.project nor the environment names one

Outcome = Literal["finished", "stopped", "failed"]  # stopped: with a checkpoint, before the last step


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """The run that is logged."""

    name: str | None  # run.name; None: that of the logger's environment variable, or the name of the run folder
    project: str | None  # run.project; None: that of the logger's environment variable, or PROJECT
    folder: Path
    settings: Mapping[str, Any]  # nested, without secrets
    resume_step: int = 0  # last step done; 0: none
    results: tuple[str, ...] = ("loss",)  # the metrics by which runs are compared


@dataclass(frozen=True, kw_only=True)
class SampleTable:
    """Samples of one step. Cells are numbers, texts, or None."""

    columns: tuple[str, ...]
    rows: Sequence[tuple[Any, ...]] = field(default_factory=tuple)


class Logger(Protocol):
    """One place that shows a run. Any method may raise any error: `Loggers` prints a line, and the run continues.

    name: as in `run.loggers`. fix: what a user does after an error, as the end of a sentence. in_background: whether
    its calls may wait for a network, so that a thread makes them.
    """

    name: str
    fix: str
    in_background: bool

    def open(self) -> str:
        """Starts the run there, or continues it after a restart. Returns a line that names the place; empty: none."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Adds finite numbers of one step. A step that is made again after a restart is added again."""

    def samples(self, step: int, table: SampleTable) -> None:
        """Adds a table of samples."""

    def close(self, outcome: Outcome) -> None:
        """Sends what is left and ends the run there."""

    def is_temporary(self, error: Exception) -> bool:
        """Whether the same call may succeed later."""
