"""Finds the config.json of a model: in a folder, or of a published size that the package has."""

from dataclasses import replace
from pathlib import Path

from megatron_paint.base.argument_parser import did_you_mean
from megatron_paint.base.errors import UserError
from megatron_paint.models.qwen3.shape import read_shape
from megatron_paint.models.shape import ModelShape

FOLDER = Path(__file__).with_name("sizes")


def known_sizes() -> list[str]:
    """Names of the sizes whose config.json is in the package, smallest first."""
    return sorted((path.name for path in FOLDER.iterdir()), key=lambda name: read_shape(FOLDER / name).num_parameters)


def find_model(name: str) -> tuple[str, ModelShape]:
    """The short name and the sizes of a model: a folder, a config.json, or a name such as qwen3_8b or Qwen/Qwen3-8B.

    UserError: there is no such folder and no such size.
    """
    path = Path(name)
    if path.name == "config.json" and not path.is_dir():
        path = path.parent
    size = name.rstrip("/").rsplit("/", 1)[-1].lower().replace("-", "_").replace(".", "p")
    if path.is_dir() or not (FOLDER / size / "config.json").is_file():
        if not path.is_dir():
            near = did_you_mean(size, known_sizes()) or f"known sizes are {', '.join(known_sizes())}"
            raise UserError(f"MODEL={name!r} is neither a folder with a config.json nor a known size: {near}")
        return path.resolve().name, read_shape(path)
    return size, read_shape(FOLDER / size)


def sizes_of(shape: ModelShape) -> ModelShape:
    """The sizes without the file that they were read from, to compare models."""
    return replace(shape, source="")


def folder_of(shape: ModelShape) -> str:
    """The folder of the config.json that the sizes were read from."""
    return str(Path(shape.source).parent)
