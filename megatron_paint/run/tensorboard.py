"""TensorBoard files of a run, where TensorBoard is installed."""

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from megatron_paint.base.errors import UserError
from megatron_paint.runtime.files import disk_errors

LACKING = "TensorBoard files are not written: pip install tensorboard, or set run.tensorboard=false"


class TensorBoardLog:
    """Scalars by step, through torch.utils.tensorboard; nothing is written before the first of them.

    folder: usually `tensorboard` of the run folder. resume_step: later steps in the folder are taken back.
    UserError: tensorboard is not installed, or the disk refuses.
    """

    def __init__(self, folder: Path, *, resume_step: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(LACKING) from error
        self.folder = folder
        self._open = partial(SummaryWriter, log_dir=str(folder), purge_step=resume_step + 1 if resume_step else None)
        self._writer: SummaryWriter | None = None

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Write the finite values of one step."""
        with disk_errors(self.folder):
            self._writer = self._writer or self._open()
            for name, value in values.items():
                if name != "step" and math.isfinite(value):
                    self._writer.add_scalar(name, value, step)
            self._writer.flush()

    def close(self) -> None:
        """Finish the files."""
        with disk_errors(self.folder):
            if self._writer is not None:
                self._writer.close()


def open_tensorboard(folder: Path, *, resume_step: int = 0) -> tuple[TensorBoardLog | None, str]:
    """The log, or None with the one line that says why not: a run does not stop for want of TensorBoard."""
    try:
        return TensorBoardLog(folder, resume_step=resume_step), ""
    except UserError as error:
        return None, str(error)
