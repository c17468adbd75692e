"""Reads a Megatron checkpoint as the Hugging Face tensors of its model, with adapters merged or separate."""

import json
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from megatron_paint.base.counts import agreeing, count_text
from megatron_paint.base.errors import UserError
from megatron_paint.checkpoints.dtypes import row_blocks
from megatron_paint.checkpoints.expected_tensors import check_tensors
from megatron_paint.checkpoints.manifest import Stored, checksums
from megatron_paint.checkpoints.megatron_folder import megatron_folder
from megatron_paint.checkpoints.run_state import RUN_STATE
from megatron_paint.checkpoints.stacked_adapters import ExpertWeight, expert_weight
from megatron_paint.checkpoints.torch_dist import CheckpointReader
from megatron_paint.models.qwen3.mapping import Entry, checkpoint_entries, part
from megatron_paint.models.shape import ModelShape

# The parameters with a row for each entry of the vocabulary. Megatron pads them for tensor parallelism.
VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
NOT_MODEL = ("optimizer.", "teacher.", "rng", "rerun", "chained_")  # prefixes of a run's other state
ADAPTERS = {  # projection -> the module of its adapters in a layer of the checkpoint
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "self_attention.qkv_adapters"),
    "o_proj": "self_attention.proj_adapters",
    **dict.fromkeys(("gate_proj", "up_proj"), "mlp.fc1_adapters"),
    "down_proj": "mlp.fc2_adapters",
}
EXPERT_ADAPTERS = "decoder.layers.mlp.expert_adapters"


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Rank and scale of a checkpoint's adapters."""

    rank: int
    alpha: float

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class MegatronSource:
    """A Megatron checkpoint of a model. Raises UserError if it does not have exactly the parameters of `shape`.

    Vocabulary rows beyond those of `shape` pad the vocabulary. They are left out; `notes` has a line about them.
    """

    def __init__(self, folder: str | Path, shape: ModelShape):
        self.folder, self.shape = megatron_folder(folder), shape
        self.reader = CheckpointReader(self.folder)
        self.entry_of: dict[str, Entry] = {}  # Hugging Face tensor -> the parameter that contains it
        for entry in checkpoint_entries(shape):
            self.entry_of |= dict.fromkeys(entry.rule.hf_shapes(), entry)
        self.padded = self._padded()
        self._check()

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know about the weights."""
        rows, size = {key: self._shape(key)[0] for key in self.padded}, self.shape.vocab_size
        return tuple(
            f"{self.folder}: {key} has {count:,} rows and the vocabulary of {self.shape.source} has {size:,}: the "
            f"{count_text(count - size, 'row')} beyond it {agreeing(count - size, 'is', 'are')} padding and "
            f"{agreeing(count - size, 'is', 'are')} left out"
            for key, count in rows.items()
        )

    @cached_property
    def lora(self) -> Lora | None:
        """The settings of the adapters, as the training run recorded them; None without adapters."""
        if not any("_adapters." in key for key in self.model_keys):
            return None
        path = self.folder / RUN_STATE
        try:
            recorded = json.loads(path.read_text(encoding="utf-8"))["settings"]["model"]["lora"]
            lora = Lora(rank=int(recorded["rank"]), alpha=float(recorded["alpha"]))
            if lora.rank < 1 or not math.isfinite(lora.alpha):
                raise ValueError(f"rank {lora.rank}, alpha {lora.alpha}")
            return lora
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.folder} has adapters, but {path} does not have their rank and alpha ({error}); the checkpoint "
                "must come from a training run of megatron_paint"
            ) from None

    def checksums(self) -> dict[str, str]:
        """Returns the SHA-256 that the manifest has of each Hugging Face tensor, by name.

        Left out: tensors whose type differs from the type in the manifest. Empty without a manifest, and with adapters,
        because merging changes the tensors. Raises UserError if the manifest is damaged or of other tensors.
        """
        if self.lora is not None:
            return {}
        shapes = {name: entry.rule.hf_shapes()[name] for name, entry in self.entry_of.items()}
        padded = {name: self._shape(entry.key) for name, entry in self.entry_of.items() if entry.key in self.padded}
        stored = {name: Stored(self.dtype(name), shape) for name, shape in (shapes | padded).items()}
        return {name: sha256 for name, sha256 in checksums(self.folder, stored).items() if name not in padded}

    def dtype(self, name: str) -> torch.dtype:
        """Returns the type in which a Hugging Face tensor is stored here."""
        return self.reader.tensors[self.entry_of[name].key].dtype

    def blocks(self, entry: Entry) -> Iterator[tuple[str, int, Tensor]]:
        """Yields all rows of the Hugging Face tensors in a parameter, in order: (tensor, first row, values).

        Values with merged adapters are float32. The caller rounds them once.
        """
        for rows in row_blocks(entry.rule.shape):
            block = self.reader.read(entry.key, entry.place, rows)
            for segment in entry.rule.segments:
                low, high = max(rows.start, segment.row), min(rows.stop, segment.row + segment.rows)
                if low < high:
                    values, first = block[low - rows.start : high - rows.start], low - segment.row + segment.source
                    yield segment.name, first, self._merged(segment.name, first, values)

    def _merged(self, name: str, first_row: int, values: Tensor) -> Tensor:
        if self.lora is None or (pair := self.adapter(name, slice(first_row, first_row + len(values)))) is None:
            return values
        a_KI, b_OK = pair
        return values.float() + self.lora.scale * (b_OK.float() @ a_KI.float())

    def adapter(self, name: str, rows: slice | None = None) -> tuple[Tensor, Tensor] | None:
        """Returns A [rank, inputs] and these rows of B [outputs, rank]; None if the tensor has no adapter."""
        if (place := expert_weight(name)) is not None:
            pair = self.expert_pair(place)
            return None if pair is None else (pair[0], pair[1] if rows is None else pair[1][rows])
        projection = name.split(".")[-2]
        if projection not in ADAPTERS or not self.entry_of[name].place:
            return None
        stem = f"decoder.layers.{ADAPTERS[projection]}"
        place = self.entry_of[name].place[:1]
        a, b = (f"{stem}.{side}.{projection}" for side in ("a", "b"))
        if a not in self.reader.tensors:
            return None
        rank, outputs = self.reader.tensors[a].shape[1], self.reader.tensors[b].shape[1]
        return self.reader.read(a, place, slice(0, rank)), self.reader.read(b, place, rows or slice(0, outputs))

    @property
    def adapts_experts(self) -> bool:
        """Whether the experts of a mixture have adapters."""
        return f"{EXPERT_ADAPTERS}.a.gate_up_proj" in self.reader.tensors

    def expert_pair(self, place: ExpertWeight) -> tuple[Tensor, Tensor] | None:
        """A [rank, inputs] and B [outputs, rank] of an expert's weight; None if it has no adapter."""
        if not self.adapts_experts:
            return None
        a, b = (f"{EXPERT_ADAPTERS}.{side}.{place.stacked}" for side in ("a", "b"))
        outputs = self.reader.tensors[b].shape[2]
        rows = slice(0, outputs) if place.half is None else part(outputs, rank=place.half, ranks=2)
        at = (place.layer, place.expert)
        return self.reader.read(a, at, slice(0, self.reader.tensors[a].shape[2])), self.reader.read(b, at, rows)

    def stacked(self, layer: int, name: str, side: str) -> Tensor:
        """A [experts, rank, inputs] or B [experts, outputs, rank] of a stacked projection of a layer's experts."""
        key = f"{EXPERT_ADAPTERS}.{side.lower()}.{name}"
        return self.reader.read(key, (layer,), slice(0, self.reader.tensors[key].shape[1]))

    def adapter_bytes(self) -> int:
        """Returns the size of all adapters in bytes."""
        return sum(self.reader.tensors[key].nbytes for key in self.model_keys if "_adapters." in key)

    @property
    def model_keys(self) -> list[str]:
        """The tensors of the model and its adapters, without a run's other state."""
        return [key for key in self.reader.tensors if not key.startswith(NOT_MODEL)]

    def _adapter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of all adapter tensors: seven projections, layers and experts stacked."""
        if self.lora is None:
            return {}
        shapes, layers = self._expert_adapter_shapes(), self.shape.num_layers
        for name, entry in self.entry_of.items():
            projection = name.split(".")[-2]
            if projection in ADAPTERS and entry.place == (0,):
                outputs, inputs = entry.rule.hf_shapes()[name]
                stem = f"decoder.layers.{ADAPTERS[projection]}"
                shapes[f"{stem}.a.{projection}"] = (layers, self.lora.rank, inputs)
                shapes[f"{stem}.b.{projection}"] = (layers, outputs, self.lora.rank)
        return shapes

    def _expert_adapter_shapes(self) -> dict[str, tuple[int, ...]]:
        if not self.adapts_experts:
            return {}
        stack, rank = (self.shape.num_layers, self.shape.num_experts), self.lora.rank
        hidden, ffn = self.shape.hidden_size, self.shape.expert_ffn_size
        shapes = {}
        for stacked, (inputs, outputs) in {"gate_up_proj": (hidden, 2 * ffn), "down_proj": (ffn, hidden)}.items():
            shapes[f"{EXPERT_ADAPTERS}.a.{stacked}"] = (*stack, rank, inputs)
            shapes[f"{EXPERT_ADAPTERS}.b.{stacked}"] = (*stack, outputs, rank)
        return shapes

    def _shape(self, key: str) -> tuple[int, ...]:
        return self.reader.tensors[key].shape

    def _padded(self) -> tuple[str, ...]:
        """The parameters that have more rows than the vocabulary."""
        expected = (self.shape.vocab_size, self.shape.hidden_size)
        stored = {key: self._shape(key) for key in VOCABULARY if key in self.reader.tensors}
        return tuple(key for key, shape in stored.items() if shape[1:] == expected[1:] and shape[0] > expected[0])

    def _check(self) -> None:
        expected = {entry.key: entry.shape for entry in self.entry_of.values()} | self._adapter_shapes()
        expected |= {key: self._shape(key) for key in self.padded if key in expected}
        found = {key: self._shape(key) for key in self.model_keys}
        check_tensors(self.folder, found, expected, config=self.shape.source)
        for key, shape in expected.items():
            filled = sum(math.prod(piece.sizes) for piece in self.reader.tensors[key].pieces)
            if filled != math.prod(shape):
                raise UserError(f"{self.folder}: the pieces of {key} have {filled} of {math.prod(shape)} elements")


def unreadable_file(folder: Path, keys: Collection[str] | None = None) -> str | None:
    """Reads every piece of the tensors `keys`; returns what is wrong with the first that cannot be read, or None.

    keys: None reads all tensors and the common part.
    """
    try:
        reader = CheckpointReader(folder)
        for key in reader.tensors if keys is None else keys:
            reader.check_pieces(key)
        if keys is None:
            reader.check_common()
    except UserError as error:
        return str(error)
    return None
