"""Hugging Face -> Megatron: a checkpoint that any layout loads, without a model, a few tensors at a time."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_paint.convert.hf_reader import HuggingFaceReader
from megatron_paint.convert.manifest import write_manifest
from megatron_paint.convert.mapping import Entry, checkpoint_entries, hugging_face_shapes
from megatron_paint.convert.torch_dist import PieceWriter, write_metadata
from megatron_paint.convert.work import Task, check_names, cut_tasks, fingerprint, merged
from megatron_paint.qwen3 import read_shape

PIECE_BYTES = 64 * 10**6  # what a rank that wants any row of a piece has to read


@dataclass(frozen=True, kw_only=True)
class ToMegatron:
    """The job; weights keep their type unless `dtype` names another ("bfloat16", "float16", "float32")."""

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

    def begin(self, folder: Path) -> None:
        HuggingFaceReader(self.source, read_shape(self.source))  # refuses what is not a whole Qwen3

    def entries(self) -> list[Entry]:
        return list(checkpoint_entries(read_shape(self.source)))

    def tasks(self) -> Sequence[Task]:
        stored = HuggingFaceReader(self.source, read_shape(self.source)).tensors
        return cut_tasks([sum(stored[name].nbytes for name in entry.rule.hf_shapes()) for entry in self.entries()])

    def worker(self, folder: Path) -> Callable[[Task], dict[str, Any]]:
        entries, reader = self.entries(), HuggingFaceReader(self.source)

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

        for rows in row_blocks(entry.rule.shape, PIECE_BYTES):
            values = entry.rule.read_rows(read, rows)
            if self.dtype is not None:
                values = values.to(getattr(torch, self.dtype))
            offsets = (*entry.place, rows.start, *[0] * (len(entry.rule.shape) - 1))
            writer.write(entry.key, entry.shape, offsets, values)
        return {
            name: {
                "dtype": str(reader.tensors[name].dtype).removeprefix("torch."),
                "shape": list(shape),
                "sha256": digests[name].hexdigest() if self.checksums else None,
            }
            for name, shape in entry.rule.hf_shapes().items()
        }

    def finish(self, folder: Path, records: Sequence[dict[str, Any]]) -> None:
        tensors = merged(records, "tensors")
        check_names(tensors, hugging_face_shapes(read_shape(self.source)))
        write_metadata(folder, (piece for record in records for piece in record["pieces"]), common={})
        write_manifest(folder, source=self.source, tensors=tensors)


def row_blocks(shape: Sequence[int], most_bytes: int) -> Iterator[slice]:
    """Runs of rows of about equal size, none above `most_bytes` of 2-byte numbers (or one row)."""
    rows = shape[0]
    blocks = max(1, -(-prod(shape) * 2 // most_bytes))
    step = -(-rows // blocks)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def raw_bytes(values: Tensor) -> memoryview:
    """The numbers as they stand in a file."""
    return memoryview(values.contiguous().view(-1).view(torch.uint8).numpy())
