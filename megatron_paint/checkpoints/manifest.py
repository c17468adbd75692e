"""What a conversion read or wrote on the Hugging Face side: every tensor with its type, shape and SHA-256."""

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
    """What the manifest says of one tensor."""
    return {"dtype": str(dtype).removeprefix("torch."), "shape": list(shape), "sha256": sha256}


def write_manifest(folder: Path, *, source: Path, base: Path, tensors: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes the manifest into a checkpoint; the config of `base` goes with it, so that its sizes stand there too."""
    content = {
        "made_by": f"megatron_paint {__version__}",
        "source": str(source),
        "config": json.loads((base / "config.json").read_text(encoding="utf-8")),
        "tensors": dict(tensors),
    }
    (folder / MANIFEST).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest, or None where a checkpoint has none; UserError where it is damaged."""
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
                raise ValueError(f"the checksum of {name} is none")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); convert the checkpoint again") from None
    return content


class Stored(NamedTuple):
    """What stands in a folder under a tensor's name."""

    dtype: torch.dtype
    shape: tuple[int, ...]


def checksums(folder: Path, stored: Mapping[str, Stored]) -> dict[str, str]:
    """SHA-256 by tensor, as recorded, of those that stand in `folder` in the recorded type.

    stored: all that stand there; UserError where the manifest tells of other tensors or shapes.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return {}
    recorded = manifest["tensors"]
    shapes = {name: list(tensor.shape) for name, tensor in stored.items()}
    if shapes != {name: entry["shape"] for name, entry in recorded.items()}:
        raise UserError(f"{folder / MANIFEST} is of other tensors than those beside it; convert the checkpoint again")
    same = {n for n, tensor in stored.items() if recorded[n]["dtype"] == str(tensor.dtype).removeprefix("torch.")}
    return {name: recorded[name]["sha256"] for name in same if recorded[name]["sha256"]}
