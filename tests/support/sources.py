"""The files of the repository from which the package is built."""

import shutil
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "megatron_paint", "examples")


def copy_sources(folder: Path) -> Path:
    """Copies them into a new folder, because a build leaves files behind. Returns the folder."""
    folder.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder
