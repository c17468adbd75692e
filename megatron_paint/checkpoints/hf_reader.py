"""Reads slices of tensors from the safetensors files of a Hugging Face checkpoint folder.

The safetensors library checks the header of each file. The bytes are then read with ordinary reads. The pages of the
library's memory map would count as memory of this process, up to the size of the checkpoint.
"""

import json
import os
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_paint.base.errors import UserError
from megatron_paint.checkpoints.dtypes import row_blocks
from megatron_paint.checkpoints.expected_tensors import check_tensors
from megatron_paint.checkpoints.tensor_places import TensorPlace, named_as_qwen3
from megatron_paint.models.qwen3.mapping import hugging_face_shapes
from megatron_paint.models.shape import ModelShape

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class HuggingFaceReader:
    """The tensors of a safetensors checkpoint in one or more files, by the names of `transformers`.

    With `shape`, the checkpoint must have exactly the tensors of that model, unless `check` is False. Raises UserError
    if it does not, or if a file is missing or damaged.
    notes: one line for each way in which the folder differs from what `transformers` writes.
    """

    def __init__(self, folder: str | Path, shape: ModelShape | None = None, *, check: bool = True):
        self.folder = Path(folder)
        self.notes: list[str] = []
        self.tensors, renamed = named_as_qwen3(self._locate(), str(folder))
        self.notes += renamed
        if shape is not None and shape.tied and HEAD in self.tensors and EMBEDDING not in self.tensors:
            self.tensors[EMBEDDING] = self.tensors.pop(HEAD)
            self.notes.append(f"{HEAD} is read as the embedding, which the config ties to it")
        self._open: dict[str, int] = {}
        if shape is not None and check:
            self._check(shape)

    def __call__(self, name: str, *, rows: slice = slice(None), columns: slice | None = None) -> Tensor:
        """Returns rows and columns of tensor `name`, on the CPU, in the checkpoint's type."""
        place = self.tensors[name]
        first, stop, _ = rows.indices(place.shape[0])
        row_bytes = place.nbytes // place.shape[0]
        flat = torch.empty((stop - first) * row_bytes, dtype=torch.uint8)
        self._fill(flat, place, first * row_bytes)
        values = flat.view(place.dtype).view(stop - first, *place.shape[1:])
        return values if columns is None else values[:, columns].contiguous()

    def check_tied(self, shape: ModelShape) -> None:
        """Raises UserError if a stored output layer differs from the embedding although the config ties the two."""
        if not shape.tied or HEAD not in self.tensors:
            return
        same = self.tensors[HEAD].shape == self.tensors[EMBEDDING].shape
        blocks = row_blocks(self.tensors[EMBEDDING].shape)
        if not same or not all(torch.equal(self(HEAD, rows=rows), self(EMBEDDING, rows=rows)) for rows in blocks):
            raise UserError(
                f"{self.folder}: its config.json ties {HEAD} to {EMBEDDING}, but the stored tensors differ; if the "
                "output layer is a separate one, set tie_word_embeddings to false there"
            )

    def close(self) -> None:
        """Closes the files."""
        while self._open:
            os.close(self._open.popitem()[1])

    def _fill(self, flat: Tensor, place: TensorPlace, offset: int) -> None:
        path = self.folder / place.file
        buffer, at = memoryview(flat.numpy()), place.start + offset
        try:
            if place.file not in self._open:
                self._open[place.file] = os.open(path, os.O_RDONLY)
            while buffer:
                count = os.preadv(self._open[place.file], [buffer], at)
                if not count:
                    raise UserError(f"{path} became shorter while it was read; copy it again")
                buffer, at = buffer[count:], at + count
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror})") from None

    def _locate(self) -> dict[str, TensorPlace]:
        """Returns the stored tensors. Of two sets of weights it takes the single file, as `transformers` does."""
        index, single = self.folder / INDEX, (self.folder / SINGLE).exists()
        if single and index.exists() and not self._lists_single(index):
            self.notes.append(f"{INDEX} is beside {SINGLE}; it is of other weights and is not read")
            return self._places(SINGLE)
        if not index.exists():
            if not single:
                hint = "; download the weights too"
                if any(self.folder.glob("*.bin")):
                    hint = " (convert the .bin files to safetensors first)"
                if any(self.folder.glob("*.safetensors")):
                    hint = " (its other .safetensors files need the index; download it)"
                raise UserError(f"{self.folder} has neither {SINGLE} nor {INDEX}{hint}")
            return self._places(SINGLE)
        file_of = self._read_index(index)
        self._check_present(set(file_of.values()))
        places = {file: self._places(file) for file in sorted(set(file_of.values()))}
        for name, file in file_of.items():
            if name not in places[file]:
                raise UserError(f"{index} lists {name} in {file}, but the file does not have it")
        for file, held in places.items():
            for name in held:
                if file_of.get(name) != file:
                    raise UserError(f"{self.folder / file} has {name}, but {INDEX} does not list it there")
        return {name: places[file][name] for name, file in file_of.items()}

    def _check_present(self, listed: set[str]) -> None:
        missing = sorted(file for file in listed if not (self.folder / file).exists())
        others = sorted(path.name for path in self.folder.glob("*.safetensors") if path.name not in listed)
        if missing and others:
            raise UserError(
                f"{self.folder / INDEX} lists {missing[0]}, which is missing, and does not list {others[0]}, which is "
                "in the folder; copy the index of these files"
            )

    def _lists_single(self, index: Path) -> bool:
        """Whether the index is of a set that includes the single file. A damaged index is of no set."""
        try:
            return SINGLE in self._read_index(index).values()
        except UserError:
            return False

    def _read_index(self, index: Path) -> dict[str, str]:
        try:
            file_of = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            if not file_of or not all(isinstance(file, str) for file in file_of.values()):
                raise TypeError("weight_map names no files")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{index} is not a safetensors index ({error!r}); copy it again") from None
        for file in sorted(set(file_of.values())):
            if Path(file).name != file or not file:
                raise UserError(f"{index} points outside its folder: {file!r}")
        return file_of

    def _places(self, file: str) -> dict[str, TensorPlace]:
        path = self.folder / file
        try:
            # Checks the header against the file. "pt" would map the file privately, which Linux refuses above its RAM.
            with safe_open(path, framework="np"):
                pass
            with open(path, "rb") as stream:
                (length,) = struct.unpack("<Q", stream.read(8))
                header: dict[str, Any] = json.loads(stream.read(length))
        except FileNotFoundError:
            raise UserError(f"shard {path} is missing; download the checkpoint again") from None
        except PermissionError:
            raise UserError(f"{path}: you have no permission to read it; ask its owner") from None
        except (SafetensorError, OSError, ValueError, struct.error) as error:
            raise UserError(f"{path} is truncated or not a safetensors file ({error}); download it again") from None
        header.pop("__metadata__", None)
        return {name: self._place(name, entry, file, 8 + length) for name, entry in header.items()}

    def _place(self, name: str, entry: dict[str, Any], file: str, data: int) -> TensorPlace:
        if entry["dtype"] not in DTYPES:
            raise UserError(
                f"{name} in {self.folder / file} is stored as {entry['dtype']}; the supported types are "
                f"{', '.join(DTYPES)}: convert quantised weights first"
            )
        if not entry["shape"] or not all(entry["shape"]):
            raise UserError(f"{name} in {self.folder / file} has shape {entry['shape']}, which no tensor of Qwen3 has")
        start = data + entry["data_offsets"][0]
        return TensorPlace(file=file, dtype=DTYPES[entry["dtype"]], shape=tuple(entry["shape"]), start=start)

    def _check(self, shape: ModelShape) -> None:
        found = {name: place.shape for name, place in self.tensors.items() if not (shape.tied and name == HEAD)}
        check_tensors(self.folder, found, hugging_face_shapes(shape), config=shape.source, notes=self.notes)
