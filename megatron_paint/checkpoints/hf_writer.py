"""Writes the safetensors files of a Hugging Face folder. Their layout comes first, so any process can fill any part."""

import json
import math
import os
import shutil
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_paint.base.errors import UserError
from megatron_paint.checkpoints.dtypes import cast, raw_bytes
from megatron_paint.checkpoints.hf_reader import DTYPES, INDEX, SINGLE
from megatron_paint.checkpoints.manifest import MANIFEST
from megatron_paint.checkpoints.tensor_places import TensorPlace

SHARD_BYTES = 5 * 10**9  # the default of Hugging Face's tools
NAMES = {dtype: name for name, dtype in DTYPES.items()}
CARD = "README.md"  # the model card
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The position of every tensor of a checkpoint, and the header of each file."""

    places: Mapping[str, TensorPlace]
    headers: Mapping[str, bytes]
    sizes: Mapping[str, int]  # of the files, including headers, in bytes

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors."""
        return sum(place.nbytes for place in self.places.values())


def lay_out(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], *, shard_bytes: int = SHARD_BYTES) -> Layout:
    """Distributes tensors, in their order, to files of at most `shard_bytes`. A larger tensor gets a separate file."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * dtype.itemsize
        if groups[-1] and filled + size > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    places: dict[str, TensorPlace] = {}
    headers, sizes = {}, {}
    for number, group in enumerate(groups, start=1):
        file = SINGLE if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        headers[file], sizes[file] = _lay_out_file(file, {name: tensors[name] for name in group}, places)
    return Layout(places=places, headers=headers, sizes=sizes)


def _lay_out_file(
    file: str, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], places: dict[str, TensorPlace]
) -> tuple[bytes, int]:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format requires that tensors begin at a multiple of 8
    head = struct.pack("<Q", len(text)) + text
    for name, (dtype, shape) in tensors.items():
        start = len(head) + header[name]["data_offsets"][0]
        places[name] = TensorPlace(file=file, dtype=dtype, shape=tuple(shape), start=start)
    return head, len(head) + at


def begin_files(folder: Path, layout: Layout) -> None:
    """Creates all files with their headers and full size. Tensors that are not written yet are zeros."""
    for file, header in layout.headers.items():
        with open(folder / file, "wb") as stream:
            stream.write(header)
            stream.truncate(layout.sizes[file])


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a file of tensors in memory, with the permissions of any new file.

    safetensors writes a temporary file that only its owner can read, and renames it.
    """
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    save_file(dict(tensors), path, metadata={"format": "pt"})
    path.chmod(mode)


def write_at(descriptor: int, buffer: memoryview, at: int) -> None:
    """Writes all bytes of the buffer from byte `at` of an open file."""
    while buffer:
        count = os.pwrite(descriptor, buffer, at)
        buffer, at = buffer[count:], at + count


class RowWriter:
    """Writes rows of tensors to their positions in the files of a layout."""

    def __init__(self, folder: Path, layout: Layout):
        self.folder, self.layout = folder, layout
        self._open: dict[str, int] = {}

    def write(self, name: str, first_row: int, rows: Tensor) -> None:
        """Writes `rows` of tensor `name`, from row `first_row`, in the layout's type."""
        place = self.layout.places[name]
        buffer = raw_bytes(cast(rows, place.dtype, name))
        at = place.start + first_row * (place.nbytes // place.shape[0])
        if place.file not in self._open:
            self._open[place.file] = os.open(self.folder / place.file, os.O_WRONLY)
        write_at(self._open[place.file], buffer, at)

    def close(self) -> None:
        """Closes the files."""
        while self._open:
            os.close(self._open.popitem()[1])


def write_index(folder: Path, layout: Layout) -> None:
    """Writes the index of a checkpoint with several files. One file needs no index."""
    _write_index(folder, {name: place.file for name, place in layout.places.items()}, layout.nbytes)


def name_shards(folder: Path, written: Mapping[str, Mapping[str, int]]) -> None:
    """Renames files to their final names and writes the index. written: {file: {tensor: bytes}}."""
    file_of = {}
    for number, file in enumerate(sorted(written), start=1):
        final = SINGLE if len(written) == 1 else f"model-{number:05d}-of-{len(written):05d}.safetensors"
        os.replace(folder / file, folder / final)
        file_of |= dict.fromkeys(written[file], final)
    _write_index(folder, file_of, sum(size for tensors in written.values() for size in tensors.values()))


def _write_index(folder: Path, file_of: Mapping[str, str], nbytes: int) -> None:
    if len(set(file_of.values())) > 1:
        index = {"metadata": {"total_size": nbytes}, "weight_map": dict(sorted(file_of.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_card(folder: Path, card: str | None) -> None:
    """Writes the model card over that of the base. None: the folder keeps what it has."""
    if card is not None:
        (folder / CARD).write_text(card, encoding="utf-8", errors="backslashreplace")


def copy_companions(source: Path, folder: Path, *, dtype: torch.dtype) -> None:
    """Copies all files of a checkpoint except weights: config, tokenizer, chat template, generation settings.

    The copied config.json has `dtype` under each key of the source (`torch_dtype` in transformers 4, `dtype` in 5).
    Raises UserError if the source cannot be read.
    """
    try:
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        paths = [path for path in sorted(source.iterdir()) if path.is_file() and not path.name.startswith(".")]
    except (OSError, ValueError) as error:
        raise UserError(f"{source} cannot be read ({error}); an export copies from it") from error
    for path in paths:
        if path.suffix not in WEIGHTS and not path.name.endswith(".index.json") and path.name != MANIFEST:
            shutil.copyfile(path, folder / path.name)  # copies the content without the permissions
    for key in [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]:
        config[key] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
