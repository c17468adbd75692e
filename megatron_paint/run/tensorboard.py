"""TensorBoard files of a run, if TensorBoard is installed."""

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from megatron_paint.base.errors import UserError
from megatron_paint.runtime.files import disk_errors

MISSING = "TensorBoard files are not written: pip install tensorboard, or set run.tensorboard=false"


class TensorBoardLog:
    """Writes scalars by step with torch.utils.tensorboard. The first scalar creates the file.

    folder: usually `tensorboard` in the run folder. resume_step: TensorBoard hides later steps that
    the folder contains. UserError: tensorboard is not installed, or the disk refuses.
    """

    def __init__(self, folder: Path, *, resume_step: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(MISSING) from error
        self.folder = folder
        self._open = partial(SummaryWriter, log_dir=str(folder), purge_step=resume_step + 1 if resume_step else None)
        self._writer: SummaryWriter | None = None

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the finite values of one step."""
        with disk_errors(self.folder):
            self._writer = self._writer or self._open()
            for name, value in values.items():
                if name != "step" and math.isfinite(value):
                    self._writer.add_scalar(name, value, step)
            self._writer.flush()

    def close(self) -> None:
        """Completes the files."""
        with disk_errors(self.folder):
            if self._writer is not None:
                self._writer.close()


def open_tensorboard(folder: Path, *, resume_step: int = 0) -> tuple[TensorBoardLog | None, str]:
    """The log, or None and the reason in one line: a run continues without TensorBoard."""
    try:
        return TensorBoardLog(folder, resume_step=resume_step), ""
    except UserError as error:
        return None, str(error)
