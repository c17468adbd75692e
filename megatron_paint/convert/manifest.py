"""What a conversion read or wrote on the Hugging Face side: every tensor with its type, shape and SHA-256."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_paint import __version__
from megatron_paint.errors import UserError

MANIFEST = "conversion.json"


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
        tensors = content["tensors"]
        if not all({"dtype", "shape", "sha256"} <= entry.keys() for entry in tensors.values()):
            raise ValueError("an entry lacks its type, shape or checksum")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}); convert the checkpoint again") from None
    return content


def checksums(folder: Path, stored: Mapping[str, torch.dtype]) -> dict[str, str]:
    """SHA-256 by tensor, as recorded, of those that stand in `folder` in the recorded type; stored: types there."""
    manifest = read_manifest(folder)
    if manifest is None:
        return {}
    return {
        name: entry["sha256"]
        for name, entry in manifest["tensors"].items()
        if entry["sha256"] and name in stored and entry["dtype"] == str(stored[name]).removeprefix("torch.")
    }
