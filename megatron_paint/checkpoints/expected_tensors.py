"""Compares the names and shapes of stored tensors with those that a config expects."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_paint.base.errors import UserError

PROBLEMS_SHOWN = 3  # of each kind
Shapes = Mapping[str, tuple[int, ...]]


def tensor_problems(found: Shapes, expected: Shapes) -> list[str]:
    """Returns one line for each missing tensor, then for each surplus tensor, then for each wrong shape."""
    return [problem for kind in _problems(found, expected) for problem in kind]


def _problems(found: Shapes, expected: Shapes) -> tuple[list[str], list[str], list[str]]:
    missing = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    surplus = [f"{name} does not belong to the model of the config" for name in sorted(found.keys() - expected.keys())]
    shapes = [
        f"{name} has shape {tuple(found[name])}, but the config expects {tuple(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    return missing, surplus, shapes


def check_tensors(folder: Path, found: Shapes, expected: Shapes, *, config: str, notes: Sequence[str] = ()) -> None:
    """Raises UserError if names or shapes differ.

    The message has the first problems of each kind, so that a surplus name shows what a missing one is called.
    config: path of the config. notes: what else the message says about the folder.
    """
    kinds = _problems(found, expected)
    if any(kinds):
        shown = [problem for kind in kinds for problem in kind[:PROBLEMS_SHOWN]]
        more = sum(map(len, kinds)) - len(shown)
        lines = [*shown, *[f"and {more} more"] * (more > 0), *notes]
        raise UserError(f"{folder} is not a model of {config}: {'; '.join(lines)}")
