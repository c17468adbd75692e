"""Hugging Face -> Megatron: makes a checkpoint that any layout can load, a few tensors at a time."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_paint.base.errors import UserError
from megatron_paint.checkpoints.dtypes import PIECE_BYTES, cast, raw_bytes, row_blocks
from megatron_paint.checkpoints.hf_reader import HuggingFaceReader
from megatron_paint.checkpoints.manifest import manifest_entry, write_manifest
from megatron_paint.checkpoints.tensor_places import TensorPlace
from megatron_paint.checkpoints.torch_dist import PieceWriter, write_metadata
from megatron_paint.convert.work import Task, check_names, cut_tasks, fingerprint, merged
from megatron_paint.models.qwen3.mapping import Entry, checkpoint_entries, empty_entries, hugging_face_shapes
from megatron_paint.models.qwen3.shape import read_shape
from megatron_paint.models.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class ToMegatron:
    """The conversion job. Weights keep their type unless `dtype` is given ("bfloat16", "float16", "float32")."""

    source: Path
    dtype: str | None = None
    checksums: bool = True

    @property
    def sources(self) -> tuple[Path, ...]:
        return (self.source,)

    def plan(self) -> dict[str, Any]:
        return {
            "conversion": "to-megatron",
            "source": str(self.source.resolve()),
            "files": fingerprint(self.source),
            "dtype": self.dtype,
            "checksums": self.checksums,
            "piece_bytes": PIECE_BYTES,
        }

    @cached_property
    def shape(self) -> ModelShape:
        return read_shape(self.source)

    @cached_property
    def stored(self) -> Mapping[str, TensorPlace]:
        """The tensors of the source. Raises UserError if it is not a complete Qwen3 model."""
        return HuggingFaceReader(self.source, self.shape).tensors

    @cached_property
    def entries(self) -> list[Entry]:
        return list(checkpoint_entries(self.shape))

    def begin(self, folder: Path) -> None:
        HuggingFaceReader(self.source, self.shape).check_tied(self.shape)
        self._check_types()

    def _check_types(self) -> None:
        """Raises UserError if tensors of one Megatron tensor, which stacks all layers, have several types."""
        first_of: dict[str, str] = {}
        for entry in self.entries if self.dtype is None else []:
            for name in entry.rule.hf_shapes():
                first = first_of.setdefault(entry.key, name)
                types = [str(self.stored[n].dtype).removeprefix("torch.") for n in (first, name)]
                if types[0] != types[1]:
                    raise UserError(
                        f"{self.source}: {first} is {types[0]} and {name} {types[1]}, but Megatron keeps both in one "
                        "tensor; choose their type with --dtype"
                    )

    def tasks(self) -> Sequence[Task]:
        return cut_tasks([sum(self.stored[name].nbytes for name in entry.rule.hf_shapes()) for entry in self.entries])

    def notes(self) -> Sequence[str]:
        return HuggingFaceReader(self.source, self.shape).notes

    def worker(self, folder: Path) -> Callable[[Task], dict[str, Any]]:
        entries, reader = self.entries, HuggingFaceReader(self.source, self.shape)

        def work(task: Task) -> dict[str, Any]:
            writer, hashes = PieceWriter(folder / f"__{task.number}_0.distcp"), {}
            for index in task.entries:
                hashes |= self._convert(entries[index], reader, writer)
            writer.close()
            return {"files": [writer.path.name], "pieces": writer.written, "tensors": hashes}

        return work

    def _convert(self, entry: Entry, reader: HuggingFaceReader, writer: PieceWriter) -> dict[str, Any]:
        digests = {name: hashlib.sha256() for name in entry.rule.hf_shapes()} if self.checksums else {}

        def read(name: str, *, rows: slice, columns: slice | None = None) -> Tensor:
            values = reader(name, rows=rows, columns=columns)
            if self.checksums:
                digests[name].update(raw_bytes(values))
            return values

        for rows in row_blocks(entry.rule.shape):
            values = entry.rule.read_rows(read, rows)
            if self.dtype is not None:
                values = cast(values, getattr(torch, self.dtype), " and ".join(entry.rule.hf_shapes()))
            offsets = (*entry.place, rows.start, *[0] * (len(entry.rule.shape) - 1))
            writer.write(entry.key, entry.shape, offsets, values)
        return {
            name: manifest_entry(
                reader.tensors[name].dtype, shape, digests[name].hexdigest() if self.checksums else None
            )
            for name, shape in entry.rule.hf_shapes().items()
        }

    def finish(self, folder: Path, records: Sequence[dict[str, Any]]) -> None:
        tensors = merged(records, "tensors")
        check_names(tensors, hugging_face_shapes(self.shape))
        pieces = (piece for record in records for piece in record["pieces"])
        write_metadata(folder, pieces, common={}, empty=empty_entries(self.shape))
        write_manifest(folder, source=self.source, base=self.source, tensors=tensors)
