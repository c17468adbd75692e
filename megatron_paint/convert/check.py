"""Compares a Hugging Face checkpoint with a Megatron one, number by number, and describes the content of either."""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_paint.checkpoints.dtypes import raw_bytes
from megatron_paint.checkpoints.expected_tensors import tensor_problems
from megatron_paint.checkpoints.hf_reader import EMBEDDING, HEAD, HuggingFaceReader
from megatron_paint.checkpoints.manifest import MANIFEST, Stored, checksums, read_manifest
from megatron_paint.checkpoints.megatron_folder import METADATA
from megatron_paint.checkpoints.megatron_source import NOT_MODEL, MegatronSource
from megatron_paint.checkpoints.torch_dist import CheckpointReader, StoredTensor
from megatron_paint.models.qwen3.mapping import checkpoint_entries, hugging_face_shapes
from megatron_paint.models.qwen3.shape import read_shape, shape_of


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One tensor that differs between the two sides."""

    name: str
    largest: float  # largest |difference|
    where: tuple[int, ...]  # index of the largest difference
    unequal: int  # how many numbers differ


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The result of a comparison."""

    tensors: int
    nbytes: int
    differences: tuple[Difference, ...]
    bad_checksums: tuple[tuple[str, str], ...]  # (tensor, folder) that differ from the manifest in that folder
    checksums: int  # how many tensors were compared with a checksum in a manifest
    notes: tuple[str, ...]  # what the user should know about the Megatron checkpoint
    rounded: int  # tensors with different types on the two sides; they were compared in the narrower type

    @property
    def equal(self) -> bool:
        return not self.differences and not self.bad_checksums


def compare(hf: Path, megatron: Path, *, progress: Callable[[int], None] = lambda nbytes: None) -> Comparison:
    """Compares every number. A side that has a manifest is also compared with it. Adapters are merged first.

    progress: called with the bytes of each compared tensor. Raises UserError if a checkpoint is damaged or of another
    model.
    """
    shape = read_shape(hf)
    reader, source = HuggingFaceReader(hf, shape), MegatronSource(megatron, shape)
    reader.check_tied(shape)
    recorded = (
        source.checksums(),
        checksums(
            hf, {name: Stored(reader.tensors[name].dtype, reader.tensors[name].shape) for name in source.entry_of}
        ),
    )
    worst: dict[str, Difference | None] = {}
    bad = []
    for entry in checkpoint_entries(shape):
        digests = {name: (hashlib.sha256(), hashlib.sha256()) for name in entry.rule.hf_shapes()}
        for name, first_row, ours in source.blocks(entry):
            sides = ours, reader(name, rows=slice(first_row, first_row + len(ours)))
            for digest, of, values in zip(digests[name], recorded, sides, strict=True):
                if name in of:
                    digest.update(raw_bytes(values))
            worst[name] = _worse(worst.get(name), _difference(name, *sides, first_row))
        for name, found in digests.items():
            for folder, digest, of in zip((megatron, hf), found, recorded, strict=True):
                if name in of and digest.hexdigest() != of[name]:
                    bad.append((name, str(folder)))
            progress(reader.tensors[name].nbytes)
    return Comparison(
        tensors=len(source.entry_of),
        nbytes=sum(reader.tensors[name].nbytes for name in source.entry_of),
        differences=tuple(found for found in worst.values() if found is not None),
        bad_checksums=tuple(bad),
        checksums=sum(map(len, recorded)),
        notes=source.notes,
        rounded=sum(source.dtype(name) != reader.tensors[name].dtype for name in source.entry_of),
    )


def _difference(name: str, ours: torch.Tensor, theirs: torch.Tensor, first_row: int) -> Difference | None:
    if ours.dtype == theirs.dtype and torch.equal(_bits(ours), _bits(theirs)):
        return None
    # If the types differ, both sides are compared in the narrower type, because the conversion rounded to it.
    dtype = min((ours.dtype, theirs.dtype), key=lambda dtype: dtype.itemsize)
    ours, theirs = ours.to(dtype), theirs.to(dtype)
    unequal = _bits(ours) != _bits(theirs)
    if not unequal.any():
        return None
    gap = (ours.double() - theirs.double()).abs().nan_to_num(nan=math.inf)
    gap = torch.where(unequal, gap, -1.0)
    at = [int(i) for i in torch.unravel_index(gap.argmax(), gap.shape)]
    return Difference(
        name=name, largest=float(gap.max()), where=(at[0] + first_row, *at[1:]), unequal=int(unequal.sum())
    )


def _bits(values: torch.Tensor) -> torch.Tensor:
    """Returns the bits of numbers as integers. So -0 differs from 0, and NaN equals NaN."""
    return values.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])


def _worse(one: Difference | None, other: Difference | None) -> Difference | None:
    if one is None or other is None:
        return one or other
    worst = max(one, other, key=lambda difference: difference.largest)
    return Difference(name=worst.name, largest=worst.largest, where=worst.where, unequal=one.unequal + other.unequal)


def describe(path: Path) -> dict[str, Any]:
    """Describes a checkpoint folder: kind, sizes, types, layout, number of parameters, and odd findings.

    Raises UserError if it cannot be read.
    """
    return _describe_megatron(path) if (path / METADATA).exists() else _describe_hugging_face(path)


def _describe_hugging_face(path: Path) -> dict[str, Any]:
    shape = read_shape(path)
    reader = HuggingFaceReader(path, shape, check=False)
    files = sorted({place.file for place in reader.tensors.values()})
    expected = hugging_face_shapes(shape)
    found = {name: place.shape for name, place in reader.tensors.items()}
    if shape.tied and HEAD in found:
        expected = {**expected, HEAD: expected[EMBEDDING]}
    odd = tensor_problems(found, expected) + reader.notes
    if shape.tied and HEAD in found:
        odd.append(f"{HEAD} is stored although the config ties it to the embedding; the two must be equal")
    dtypes = _counts(place.dtype for place in reader.tensors.values())
    if len(dtypes) > 1:
        odd.append("the tensors have several types")
    if shape.dtype not in dtypes:
        odd.append(f"config.json has the type {shape.dtype}, but no tensor has it")
    return {
        "kind": "Hugging Face",
        "model": _model(shape),
        "parameters": shape.num_parameters,
        "stored_numbers": sum(math.prod(place.shape) for place in reader.tensors.values()),
        "bytes": sum(place.nbytes for place in reader.tensors.values()),
        "dtypes": dtypes,
        "tensors": len(reader.tensors),
        "files": len(files),
        "odd": odd,
    }


def _describe_megatron(path: Path) -> dict[str, Any]:
    reader, manifest = CheckpointReader(path), read_manifest(path)
    model = {k: t for k, t in reader.tensors.items() if not k.startswith(NOT_MODEL) and "_adapters." not in k}
    odd = [f"{k} has no piece" for k, t in reader.tensors.items() if not t.pieces]
    if manifest:
        wanted = {entry.key: entry.shape for entry in checkpoint_entries(shape_of(manifest["config"], path / MANIFEST))}
        odd += tensor_problems({key: tensor.shape for key, tensor in model.items()}, wanted)
    return {
        "kind": "Megatron (torch_dist)",
        "converted_from": manifest["source"] if manifest else None,
        "parameters": sum(math.prod(t.shape) for t in model.values()),
        "bytes": sum(t.nbytes for t in reader.tensors.values()),
        "model_bytes": sum(t.nbytes for t in model.values()),
        "dtypes": _counts(t.dtype for t in model.values()),
        "tensors": len(model),
        "adapters": sum("_adapters." in k and not k.startswith(NOT_MODEL) for k in reader.tensors),
        "optimizer": any(k.startswith("optimizer.") for k in reader.tensors),
        "teacher": any(k.startswith("teacher.") for k in reader.tensors),
        "layers": next((t.shape[0] for k, t in model.items() if k.startswith("decoder.layers.")), 0),
        "tensor_parallel": _tensor_parallel(model),
        "files": len({piece.file for t in reader.tensors.values() for piece in t.pieces}),
        "pieces": sum(len(t.pieces) for t in reader.tensors.values()),
        "odd": odd,
    }


def _tensor_parallel(model: Mapping[str, StoredTensor]) -> int | None:
    """Returns the tensor-parallel size at saving: the number of column shards of a row-parallel weight."""
    stored = model.get("decoder.layers.self_attention.linear_proj.weight")
    return len({piece.offsets[-1] for piece in stored.pieces}) if stored is not None else None


def _counts(dtypes: Any) -> dict[str, int]:
    return dict(Counter(str(dtype).removeprefix("torch.") for dtype in dtypes))


def _model(shape: Any) -> dict[str, Any]:
    names = ("num_layers", "hidden_size", "num_heads", "num_groups", "head_dim", "ffn_size", "vocab_size", "tied")
    experts = ("num_experts", "experts_per_token", "expert_ffn_size") if shape.num_experts else ()
    return {name: getattr(shape, name) for name in (*names, *experts)}
