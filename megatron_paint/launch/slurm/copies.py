"""Copies beside the run of what its jobs read, so that a later attempt does not change when the user edits a file.

The name of a copy contains a checksum of its content. So a second launch with other settings makes another copy, and
the jobs of the first launch keep theirs.
"""

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

import megatron_paint
from megatron_paint.config.saved import to_yaml
from megatron_paint.config.settings import Settings
from megatron_paint.runtime.files import NewFolder, disk_errors, write_atomically

FOLDER = "logs/launch"  # in the run folder


def settings_copy(settings: Settings, *, source: str, overrides: Sequence[str]) -> tuple[str, str]:
    """Path and text of the copy of the settings: all keys, with the values of `base:` files and overrides."""
    text = to_yaml(settings)
    changes = "".join(f" {change}" for change in overrides)
    head = f"# Made by `megatron-paint launch slurm` from {source}{changes}; the jobs read this copy.\n"
    name = f"settings-{hashlib.sha256(text.encode()).hexdigest()[:8]}.yaml"
    return str(Path(settings.run.dir) / FOLDER / name), head + text


def code_folder(run_dir: str) -> Path:
    """The folder of the copy of this package's code, which is a folder of Python's search path."""
    digest = hashlib.sha256()
    for file in _code_files():
        digest.update(str(file.relative_to(_package())).encode() + b"\0" + file.read_bytes() + b"\0")
    return Path(run_dir).absolute() / FOLDER / f"code-{digest.hexdigest()[:8]}"


def write_settings(path: str, text: str) -> None:
    """Writes the copy. UserError: the disk refuses."""
    write_atomically(Path(path), text)


def write_code(folder: Path) -> None:
    """Copies the package, unless this copy exists. UserError: the disk refuses. No job sees an incomplete copy."""
    if folder.exists():
        return
    new = NewFolder(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    new.begin()
    with disk_errors(folder):
        for file in _code_files():
            target = new.unfinished / _package().name / file.relative_to(_package())
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    new.finish(mark=False)


def _package() -> Path:
    return Path(megatron_paint.__file__).parent


def _code_files() -> list[Path]:
    return sorted(f for f in _package().rglob("*") if f.is_file() and "__pycache__" not in f.parts)
