"""Megatron -> Hugging Face: makes a folder that `transformers` and vLLM can load, a few tensors at a time."""

import hashlib
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_paint.base.errors import UserError
from megatron_paint.checkpoints.dtypes import PIECE_BYTES, cast, raw_bytes
from megatron_paint.checkpoints.hf_reader import INDEX, SINGLE, HuggingFaceReader
from megatron_paint.checkpoints.hf_writer import (
    SHARD_BYTES,
    Layout,
    RowWriter,
    begin_files,
    copy_companions,
    lay_out,
    write_card,
    write_index,
    write_tensors,
)
from megatron_paint.checkpoints.manifest import manifest_entry, write_manifest
from megatron_paint.checkpoints.megatron_source import Lora, MegatronSource
from megatron_paint.checkpoints.peft import ADAPTER_FILE, STACKED, adapter_name, copy_tokenizer, write_config
from megatron_paint.checkpoints.stacked_adapters import expert_weight, packed, stacked_key
from megatron_paint.convert.work import Task, check_names, cut_tasks, fingerprint, merged
from megatron_paint.models.qwen3.mapping import Entry, checkpoint_entries, hugging_face_shapes
from megatron_paint.models.qwen3.shape import read_shape
from megatron_paint.models.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class ToHuggingFace:
    """The conversion job. It merges adapters.

    The types are `dtype` if it is given, else those of the weights in `base`, else the type in the config of `base`.
    """

    source: Path
    base: Path
    dtype: str | None = None
    shard_bytes: int = SHARD_BYTES
    checksums: bool = True
    card: str | None = None  # the text of the model card; None: that of the base

    @property
    def sources(self) -> tuple[Path, ...]:
        return self.source, self.base

    def plan(self) -> dict[str, Any]:
        return {
            "conversion": "to-hf",
            "source": str(self.source.resolve()),
            "files": fingerprint(self.source),
            "base": fingerprint(self.base),
            "dtype": self.dtype,
            "shard_bytes": self.shard_bytes,
            "piece_bytes": PIECE_BYTES,
            "checksums": self.checksums,
        }

    @cached_property
    def shape(self) -> ModelShape:
        return read_shape(self.base)

    @cached_property
    def layout(self) -> Layout:
        shapes, kept = hugging_face_shapes(self.shape), self._base_dtypes()
        default = getattr(torch, self.dtype or self.shape.dtype)
        return lay_out(
            {name: (kept.get(name, default), shape) for name, shape in shapes.items()}, shard_bytes=self.shard_bytes
        )

    def _base_dtypes(self) -> dict[str, torch.dtype]:
        """Returns the types of the base's weights. It is empty if the base has no weights or `dtype` is given."""
        if self.dtype is not None or not any((self.base / name).exists() for name in (INDEX, SINGLE)):
            return {}
        return {name: place.dtype for name, place in HuggingFaceReader(self.base, self.shape).tensors.items()}

    def begin(self, folder: Path) -> None:
        source = MegatronSource(self.source, self.shape)
        _ = source.lora, source.checksums()  # raises for damaged records before any work is done
        begin_files(folder, self.layout)

    @cached_property
    def entries(self) -> list[Entry]:
        return list(checkpoint_entries(self.shape))

    def tasks(self) -> Sequence[Task]:
        places = self.layout.places
        return cut_tasks([sum(places[name].nbytes for name in entry.rule.hf_shapes()) for entry in self.entries])

    def notes(self) -> Sequence[str]:
        return MegatronSource(self.source, self.shape).notes

    def worker(self, folder: Path) -> Callable[[Task], dict[str, Any]]:
        entries, source, layout = self.entries, MegatronSource(self.source, self.shape), self.layout
        recorded = source.checksums() if self.checksums else {}

        def work(task: Task) -> dict[str, Any]:
            writer, tensors = RowWriter(folder, layout), {}
            for index in task.entries:
                tensors |= self._convert(entries[index], source, writer, recorded)
            writer.close()
            return {"files": sorted({layout.places[name].file for name in tensors}), "tensors": tensors}

        return work

    def _convert(
        self, entry: Entry, source: MegatronSource, writer: RowWriter, recorded: Mapping[str, str]
    ) -> dict[str, Any]:
        """Writes the tensors of a parameter and returns their manifest entries.

        Raises UserError if a tensor differs from its checksum in `recorded`.
        """
        names = list(entry.rule.hf_shapes())
        read, written = ({name: hashlib.sha256() for name in names} for _ in range(2))
        unchanged = {n for n in names if n in recorded and source.dtype(n) == self.layout.places[n].dtype}
        for name, first_row, values in source.blocks(entry):
            if name in recorded:
                read[name].update(raw_bytes(values))
            values = cast(values, self.layout.places[name].dtype, name)
            if self.checksums and name not in unchanged:
                written[name].update(raw_bytes(values))
            writer.write(name, first_row, values)
        manifest = {}
        for name in names:
            if name in recorded and read[name].hexdigest() != recorded[name]:
                raise UserError(
                    f"{self.source}: {name} differs from what was converted, as its SHA-256 shows; convert or copy it "
                    "again"
                )
            sha256 = (read if name in unchanged else written)[name].hexdigest() if self.checksums else None
            place = self.layout.places[name]
            manifest[name] = manifest_entry(place.dtype, place.shape, sha256)
        return manifest

    def finish(self, folder: Path, records: Sequence[dict[str, Any]]) -> None:
        tensors = merged(records, "tensors")
        check_names(tensors, self.layout.places)
        write_index(folder, self.layout)
        dtypes = {place.dtype for place in self.layout.places.values()}
        # With mixed types the config keeps its type.
        dtype = dtypes.pop() if len(dtypes) == 1 else getattr(torch, self.shape.dtype)
        copy_companions(self.base, folder, dtype=dtype)
        write_card(folder, self.card)
        write_manifest(folder, source=self.source, base=self.base, tensors=tensors)


@dataclass(frozen=True, kw_only=True)
class ToAdapter:
    """The conversion job from the adapters of a LoRA run's checkpoint to a PEFT folder for the model in `base`."""

    source: Path
    base: Path
    dtype: str | None = None
    card: str | None = None  # the text of the model card; None: no card

    @property
    def sources(self) -> tuple[Path, ...]:
        return self.source, self.base

    def plan(self) -> dict[str, Any]:
        files, base = fingerprint(self.source), fingerprint(self.base)
        source = str(self.source.resolve())
        return {"conversion": "to-adapter", "source": source, "files": files, "base": base, "dtype": self.dtype}

    @cached_property
    def lora(self) -> Lora | None:
        return MegatronSource(self.source, read_shape(self.base)).lora

    def begin(self, folder: Path) -> None:
        """Does nothing: the one task needs no preparation."""

    def tasks(self) -> Sequence[Task]:
        if self.lora is None:
            raise UserError(f"{self.source} has no adapters; leave --lora adapter out")
        stored = MegatronSource(self.source, read_shape(self.base)).adapter_bytes()
        return [Task(number=0, entries=(0,), nbytes=stored)]

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        source = MegatronSource(self.source, read_shape(self.base))
        for name in source.entry_of:
            if expert_weight(name) is None and (pair := source.adapter(name)) is not None:
                for side, values in zip("AB", pair, strict=True):
                    yield self._cast(adapter_name(name, side), values)
        if source.adapts_experts:
            for layer, stacked in itertools.product(range(source.shape.num_layers), STACKED):
                for side in "AB":
                    yield self._cast(
                        stacked_key(layer, stacked, side), packed(side, source.stacked(layer, stacked, side))
                    )

    def _cast(self, name: str, values: Tensor) -> tuple[str, Tensor]:
        return name, cast(values, getattr(torch, self.dtype) if self.dtype else values.dtype, name)

    def notes(self) -> Sequence[str]:
        return ()

    def worker(self, folder: Path) -> Callable[[Task], dict[str, Any]]:
        def work(task: Task) -> dict[str, Any]:
            write_tensors(folder / ADAPTER_FILE, dict(self._tensors()))
            return {"files": [ADAPTER_FILE]}

        return work

    def finish(self, folder: Path, records: Sequence[dict[str, Any]]) -> None:
        source = MegatronSource(self.source, read_shape(self.base))
        write_config(
            folder,
            rank=self.lora.rank,
            alpha=self.lora.alpha,
            base=os.path.abspath(self.base),
            mixture=source.shape.num_experts > 0,
            experts=source.adapts_experts,
        )
        copy_tokenizer(self.base, folder)
        write_card(folder, self.card)
