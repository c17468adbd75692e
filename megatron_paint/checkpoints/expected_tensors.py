"""Compares the names and shapes of stored tensors with those that a config expects."""

from collections.abc import Mapping
from pathlib import Path

from megatron_paint.base.errors import UserError

PROBLEMS_SHOWN = 3
Shapes = Mapping[str, tuple[int, ...]]


def tensor_problems(found: Shapes, expected: Shapes) -> list[str]:
    """Returns one line for each missing tensor, then for each surplus tensor, then for each wrong shape."""
    missing = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    surplus = [f"{name} does not belong to the model of the config" for name in sorted(found.keys() - expected.keys())]
    shapes = [
        f"{name} has shape {tuple(found[name])}, but the config expects {tuple(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    return missing + surplus + shapes


def check_tensors(folder: Path, found: Shapes, expected: Shapes, *, config: str) -> None:
    """Raises UserError if names or shapes differ. The message has the first problems. config: path of the config."""
    problems = tensor_problems(found, expected)
    if problems:
        more = f"; and {len(problems) - PROBLEMS_SHOWN} more" if len(problems) > PROBLEMS_SHOWN else ""
        raise UserError(f"{folder} is not a model of {config}: {'; '.join(problems[:PROBLEMS_SHOWN])}{more}")
