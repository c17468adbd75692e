"""Where the tensors of a safetensors file are, under the names that Qwen3 has in `transformers`.

Trainers save a wrapped model under other names. They write a prefix (`_orig_mod.`, `module.`, `base_model.model.`), or
the model without its `model.`. `transformers` 5 keeps the experts of a layer in two tensors. Both are renamed here.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from megatron_paint.base.errors import UserError

# Parts of a name that torch's wrappers add at any depth: compile, DDP, FSDP, activation checkpointing.
WRAPPERS = frozenset({"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"})
STEM = re.compile(r"(.*?)layers\.0\.input_layernorm\.weight")
FUSED = re.compile(r"(.*\.mlp\.experts\.)(gate_up_proj|down_proj)")


@dataclass(frozen=True, kw_only=True)
class TensorPlace:
    """The position of a tensor's bytes: `nbytes` bytes from `start` of `file`."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def named_as_qwen3(stored: Mapping[str, TensorPlace], folder: str) -> tuple[dict[str, TensorPlace], list[str]]:
    """Returns the tensors by the model's names, and one line for each kind of change.

    A name that fits no pattern stays. folder: for errors. Raises UserError if two tensors get one name.
    """
    names = _unwrapped(stored)
    found: dict[str, TensorPlace] = {}
    origin: dict[str, str] = {}
    fused = False
    for old, place in stored.items():
        parts = dict(_experts(names[old], place))
        fused |= names[old] not in parts
        for name, part in parts.items():
            if name in found:
                raise UserError(f"{folder}: {origin[name]} and {old} are both {name} of the model; keep the right one")
            found[name], origin[name] = part, old
    changes = [f"{old} is read as {new}" for old, new in names.items() if old != new][:1]
    if changes:
        changes = [f"{changes[0]}, and other names likewise"]
    return found, changes + ["the experts of a layer are stored in fused tensors"] * fused


def _unwrapped(stored: Iterable[str]) -> dict[str, str]:
    """Returns the name of each tensor without wrappers and prefix. The names around layer 0 show the prefix."""
    bare = {name: ".".join(part for part in name.split(".") if part not in WRAPPERS) for name in stored}
    stems = {matched[1] for name in bare.values() if (matched := STEM.fullmatch(name))}
    if len(stems) != 1:  # no layer 0, or several models
        return bare
    (stem,) = stems
    outer = stem.removesuffix("model.")

    def renamed(name: str) -> str:
        if stem and name.startswith(stem):
            return f"model.{name.removeprefix(stem)}"
        if not stem and name.startswith(("embed_tokens.", "layers.", "norm.")):
            return f"model.{name}"
        return "lm_head.weight" if name in (f"{outer}lm_head.weight", f"{stem}lm_head.weight") else name

    return {old: renamed(name) for old, name in bare.items()}


def _experts(name: str, place: TensorPlace) -> Iterator[tuple[str, TensorPlace]]:
    """Yields the projections of single experts in a fused tensor; any other tensor as it is.

    gate_up_proj [experts, 2 x intermediate, hidden] has the rows of gate, then those of up, for each expert. down_proj
    is [experts, hidden, intermediate].
    """
    matched = FUSED.fullmatch(name)
    projections = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[matched[2]] if matched else ()
    if not projections or len(place.shape) != 3 or place.shape[1] % len(projections):
        yield name, place
        return
    experts, rows, columns = place.shape
    shape = (rows // len(projections), columns)
    size = math.prod(shape) * place.dtype.itemsize
    for number in range(experts * len(projections)):
        expert, which = divmod(number, len(projections))
        part = replace(place, shape=shape, start=place.start + number * size)
        yield f"{matched[1]}{expert}.{projections[which]}.weight", part
