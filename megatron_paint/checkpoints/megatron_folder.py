"""Finds the folder of one Megatron checkpoint. It needs no torch."""

from pathlib import Path

from megatron_paint.base.errors import UserError

METADATA = ".metadata"  # torch's description of a checkpoint
LATEST = "latest_checkpointed_iteration.txt"  # Megatron programs write it beside their iter_... folders
NAMED = 5  # folders that an error names


def megatron_folder(path: str | Path) -> Path:
    """Returns the folder of a checkpoint: `path`, or the iteration that `path`/latest_checkpointed_iteration.txt names.

    Raises UserError if that file is damaged or names a folder that does not exist, if `path` holds several checkpoints
    and no such file, or if it is of Megatron's old format.
    """
    path = Path(path)
    if (path / METADATA).exists() or not path.is_dir():
        return path
    if (path / LATEST).is_file():
        return _latest(path)
    if any(path.glob("mp_rank_*")):
        raise UserError(
            f"{path} is a checkpoint of Megatron's old format (mp_rank_...), which only its own layout can load; load "
            "it in Megatron and save it with --ckpt-format torch_dist"
        )
    if found := _checkpoints_in(path):
        raise UserError(f"{path} is a folder of checkpoints: give one of them, such as {found[-1]}")
    return path


def _latest(path: Path) -> Path:
    file = path / LATEST
    try:
        text = file.read_text(encoding="utf-8").strip()
        name = text if text == "release" else f"iter_{int(text):07d}"
    except (OSError, ValueError) as error:
        raise UserError(f"{file} names no iteration ({error}); give the folder of the checkpoint itself") from None
    if not (path / name).is_dir():
        found = ", ".join(folder.name for folder in _checkpoints_in(path)[-NAMED:])
        raise UserError(
            f"{file} names {name}, but {path} has no such folder"
            + (f"; give the folder of a checkpoint itself: {found}" if found else "; copy the checkpoint again")
        )
    return megatron_folder(path / name)


def _checkpoints_in(path: Path) -> list[Path]:
    """The checkpoints in a folder, or in its folder `checkpoints` as a run has it; the newest is the last."""
    return sorted(
        file.parent for pattern in (f"*/{METADATA}", f"checkpoints/*/{METADATA}") for file in path.glob(pattern)
    )
