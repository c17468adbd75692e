"""The manifest of a conversion: type, shape and SHA-256 of every tensor on the Hugging Face side."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_paint import __version__
from megatron_paint.base.errors import UserError

MANIFEST = "conversion.json"
TYPES = ("bfloat16", "float16", "float32", "float64")


def manifest_entry(dtype: torch.dtype, shape: Sequence[int], sha256: str | None) -> dict[str, Any]:
    """Returns the manifest's entry of one tensor."""
    return {"dtype": str(dtype).removeprefix("torch."), "shape": list(shape), "sha256": sha256}


def write_manifest(folder: Path, *, source: Path, base: Path, tensors: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes the manifest into a checkpoint. It includes the config of `base`, and so the model's sizes."""
    content = {
        "made_by": f"megatron_paint {__version__}",
        "source": str(source),
        "config": json.loads((base / "config.json").read_text(encoding="utf-8")),
        "tensors": dict(tensors),
    }
    (folder / MANIFEST).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Returns the manifest, or None if a checkpoint has none. Raises UserError if it is damaged."""
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        _ = content["config"]["model_type"], content["source"]
        for name, entry in content["tensors"].items():
            if entry["dtype"] not in TYPES or not isinstance(entry["shape"], list):
                raise ValueError(f"{name} has no type or no shape")
            if entry["sha256"] is not None and not re.fullmatch("[0-9a-f]{64}", entry["sha256"]):
                raise ValueError(f"the checksum of {name} is not a SHA-256")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); convert the checkpoint again") from None
    return content


class Stored(NamedTuple):
    """Type and shape of a tensor in a folder."""

    dtype: torch.dtype
    shape: tuple[int, ...]


def checksums(folder: Path, stored: Mapping[str, Stored]) -> dict[str, str]:
    """Returns the recorded SHA-256 of each tensor that `folder` stores in the recorded type.

    stored: all tensors of the folder. Raises UserError if the manifest has other tensors or shapes.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return {}
    recorded = manifest["tensors"]
    shapes = {name: list(tensor.shape) for name, tensor in stored.items()}
    if shapes != {name: entry["shape"] for name, entry in recorded.items()}:
        raise UserError(f"{folder / MANIFEST} lists other tensors than the checkpoint has; convert it again")
    same = {n for n, tensor in stored.items() if recorded[n]["dtype"] == str(tensor.dtype).removeprefix("torch.")}
    return {name: recorded[name]["sha256"] for name in same if recorded[name]["sha256"]}
