"""The weights of a Hugging Face folder, and whether two folders hold the same."""

from pathlib import Path

import torch
from safetensors.torch import load_file

Weights = dict[str, torch.Tensor]


def weights(folder: Path) -> Weights:
    """All tensors of a folder, however many files they are in, by name."""
    files = list(folder.glob("*.safetensors"))
    assert files, f"{folder} holds no weights"
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def weights_of_step(run: Path, step: int) -> Weights:
    """The weights that a run exported after a step."""
    return weights(run / "hf" / f"step_{step:06d}")


def same(ours: Weights, theirs: Weights) -> bool:
    """Whether names, types and every bit are equal."""
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in theirs
    )
