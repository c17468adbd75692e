"""TensorBoard files of a run: scalars, hyperparameters, and samples in the tab Text."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_paint.base.errors import UserError
from megatron_paint.config.saved import dotted
from megatron_paint.run.loggers.interface import Outcome, RunInfo, SampleTable

MISSING = "it is not installed: pip install tensorboard, or set run.tensorboard=false"
MARKDOWN = str.maketrans({character: f"&#{ord(character)};" for character in "\\`*_[]()!|~&<>"} | {"\0": ""})


class TensorBoardLogger:
    """Writes with torch.utils.tensorboard. The first values create the file.

    After a restart TensorBoard hides the later steps that the folder contains.
    """

    name = "tensorboard"
    fix = "check the disk of run.dir, or set run.tensorboard=false"
    in_background = False

    def __init__(self, info: RunInfo) -> None:
        self.info = info
        self.folder: Path = info.folder / "tensorboard"
        self._writer: Any = None
        self._end: Any = None  # the summary that ends the session of the hyperparameters

    def open(self) -> str:
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError as error:
            raise UserError(MISSING) from error
        return ""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        writer = self._open_writer()
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    def samples(self, step: int, table: SampleTable) -> None:
        writer = self._open_writer()
        writer.add_text("samples", markdown(table), step)
        writer.flush()

    def close(self, outcome: Outcome) -> None:
        if self._writer is not None:
            if outcome == "finished":
                self._writer.file_writer.add_summary(self._end)
            self._writer.close()

    def is_temporary(self, error: Exception) -> bool:
        return False

    def _open_writer(self) -> Any:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter
            from torch.utils.tensorboard.summary import hparams

            # Also after a start that ended before its first checkpoint, which this one cannot see.
            self._writer = SummaryWriter(log_dir=str(self.folder), purge_step=self.info.resume_step + 1)
            values = {key: _hyperparameter(value) for key, value in dotted(self.info.settings).items()}
            experiment, start, self._end = hparams(values, dict.fromkeys(self.info.results, 0.0))
            self._writer.file_writer.add_summary(experiment)
            self._writer.file_writer.add_summary(start)
        return self._writer


def _hyperparameter(value: Any) -> bool | float | str:
    if value is None:
        return "null"
    return value if isinstance(value, bool | int | float) else str(value)


def markdown(table: SampleTable) -> str:
    """The table in Markdown. Texts are shown as they are: nothing in them counts as Markdown or HTML."""
    lines = [table.columns, ["---"] * len(table.columns), *([_cell(value) for value in row] for row in table.rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return "<br>".join(str(value).translate(MARKDOWN).splitlines())
