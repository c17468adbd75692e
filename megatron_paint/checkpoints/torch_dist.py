"""Reads and writes Megatron's distributed checkpoint folders (torch's DCP format) piece by piece, without Megatron.

A folder has `.metadata` (a pickle with the position of each piece of each tensor), `__*.distcp` files (the pieces one
after another, each in the format of `torch.save`), `metadata.json` and `common.pt`. The pickle is read with an allow
list. Classes that do not describe tensors are replaced by a class that does nothing.
"""

import io
import json
import math
import pickle
import pickletools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata

from megatron_paint.base.errors import UserError
from megatron_paint.checkpoints.megatron_folder import METADATA

BACKEND, COMMON, EMPTY = "metadata.json", "common.pt", "__empty_0.distcp"
FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
COMMON_FORMAT = {"common_backend": "torch", "common_backend_version": 1}

_KNOWN = {
    **{("torch.distributed.checkpoint.metadata", name): getattr(metadata, name) for name in metadata.__all__},
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"): metadata._MEM_FORMAT_ENCODING,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): filesystem._StorageInfo,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
}


class _Ignored:
    """Replaces every class in a pickle that does not describe tensors. It does nothing."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    def extend(self, values: Any) -> None:
        pass


def _member(owner: Any, name: str) -> Any:
    """In place of `getattr`, by which Python 3.11.2 stores the member of an enumeration."""
    return metadata._MEM_FORMAT_ENCODING[name] if owner is metadata._MEM_FORMAT_ENCODING else _Ignored()


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        return _KNOWN.get((module, name), _Ignored)


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A box of a tensor and the position of its bytes."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """One tensor of a checkpoint."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class _Part(NamedTuple):
    """The part of a box that a piece has: from `starts` to `stops` of the tensor."""

    piece: Piece
    starts: tuple[int, ...]
    stops: tuple[int, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(b - a for a, b in zip(self.starts, self.stops, strict=True))

    def within(self, corner: Sequence[int]) -> tuple[slice, ...]:
        """Returns the part's position in a box that begins at `corner` of the tensor: one slice for each axis."""
        return tuple(slice(a - c, b - c) for a, b, c in zip(self.starts, self.stops, corner, strict=True))

    def overlaps(self, other: "_Part") -> bool:
        """Tells whether the two parts share an element."""
        edges = zip(self.starts, self.stops, other.starts, other.stops, strict=True)
        return all(max(a, c) < min(b, d) for a, b, c, d in edges)


class CheckpointReader:
    """Reads any rows of the tensors of a Megatron checkpoint, at any layout of the run that wrote it.

    Raises UserError if the checkpoint is damaged: its description here, its tensors in `read`.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.tensors = _read_metadata(self.folder)
        # Tensors whose pieces each lie in one entry of the first axis. Their pieces are found by key and that entry.
        self._stacked = {key for key, tensor in self.tensors.items() if all(p.sizes[:1] == (1,) for p in tensor.pieces)}
        self._by_place: dict[tuple, list[Piece]] = defaultdict(list)
        for key, tensor in self.tensors.items():
            for piece in tensor.pieces:
                self._by_place[key, piece.offsets[:1]].append(piece)
        self._last: tuple[Piece, Tensor] | None = None

    def read(self, key: str, place: tuple[int, ...], rows: slice) -> Tensor:
        """Returns some rows of a tensor, [number of rows, ...], in its stored type.

        place: indices into the first axes, such as layer and expert; empty for a tensor without such axes. rows: a
        slice of the next axis, with start and stop. The result has all of the axes after it. It may share memory with
        other results, so do not write to it. Raises UserError if pieces are missing, overlap or cannot be read.
        """
        stored = self.tensors[key]
        shape = stored.shape[len(place) :]
        low = (*place, rows.start, *[0] * (len(shape) - 1))
        high = (*(at + 1 for at in place), rows.stop, *shape[1:])
        sizes = [b - a for a, b in zip(low, high, strict=True)]
        parts = self._parts(key, place, low, high)
        filled = sum(math.prod(part.sizes) for part in parts)
        if filled != math.prod(sizes):
            raise UserError(
                f"{self.folder}: the pieces of {key} at {place} rows {rows.start} to {rows.stop} have {filled} of "
                f"{math.prod(sizes)} elements; the checkpoint is damaged: save or copy it again"
            )
        if len(parts) == 1:
            box = self._load(key, stored, parts[0].piece)[parts[0].within(parts[0].piece.offsets)]
        else:
            box = torch.empty(sizes, dtype=stored.dtype)
            for part in parts:
                box[part.within(low)] = self._load(key, stored, part.piece)[part.within(part.piece.offsets)]
        return box.reshape(rows.stop - rows.start, *shape[1:])

    def check_pieces(self, key: str) -> None:
        """Reads all pieces of tensor `key`. Raises UserError if one cannot be read."""
        for piece in self.tensors[key].pieces:
            self._load(key, self.tensors[key], piece)

    def check_common(self) -> None:
        """Reads the common part, if it is a separate file. Raises UserError if it cannot be read."""
        path = self.folder / COMMON
        if not path.exists():  # megatron-core 0.19 keeps it among the pieces
            return
        try:
            torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged archive can raise anything
            raise UserError(f"{path} cannot be read ({_line(error)})") from None

    def _parts(self, key: str, place: tuple[int, ...], low: Sequence[int], high: Sequence[int]) -> list[_Part]:
        """Returns the parts of a box of a tensor. Raises UserError if pieces overlap."""
        by_place = bool(place) and key in self._stacked
        found: list[_Part] = []
        for piece in self._by_place[key, place[:1]] if by_place else self.tensors[key].pieces:
            starts = tuple(map(max, low, piece.offsets))
            stops = tuple(min(b, o + s) for b, o, s in zip(high, piece.offsets, piece.sizes, strict=True))
            if all(a < b for a, b in zip(starts, stops, strict=True)):
                part = _Part(piece, starts, stops)
                if any(part.overlaps(other) for other in found):
                    raise UserError(f"{self.folder}: pieces of {key} overlap; the checkpoint is damaged: copy it again")
                found.append(part)
        return found

    def _load(self, key: str, stored: StoredTensor, piece: Piece) -> Tensor:
        """Returns the piece's tensor. The last one is kept, because its rows are often read one after another."""
        if self._last is not None and self._last[0] is piece:
            return self._last[1]
        self._last = None  # frees the old piece before the next one is loaded
        path = self.folder / piece.file
        try:
            with open(path, "rb") as file:
                tensor = torch.load(_Window(file, piece.start, piece.length), map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged archive can raise anything
            raise UserError(
                f"{path}: the piece of {key} at byte {piece.start} cannot be read ({_line(error)})"
            ) from None
        if not isinstance(tensor, Tensor) or tensor.dtype != stored.dtype or tuple(tensor.shape) != piece.sizes:
            raise UserError(f"{path}: the piece of {key} at byte {piece.start} differs from its entry in {METADATA}")
        self._last = (piece, tensor)
        return tensor


class _Window(io.RawIOBase):
    """Part of a file as a file."""

    def __init__(self, file: io.BufferedReader, start: int, length: int):
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        view = view[: max(0, self._length - self._at)]
        self._file.seek(self._start + self._at)
        count = self._file.readinto(view)
        self._at += count
        return count


def _read_metadata(folder: Path) -> dict[str, StoredTensor]:
    path = reading = folder / METADATA
    try:
        content = path.read_bytes()
        reading = folder / BACKEND
        backend = json.loads(reading.read_text(encoding="utf-8"))
        reading = path
        found = _unpickled(content)
    except FileNotFoundError as error:
        raise UserError(f"{folder} has no {Path(error.filename).name}: it is not a Megatron checkpoint") from None
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(f"{reading} cannot be read ({_line(error)}); copy the checkpoint again") from None
    if not isinstance(backend, dict) or backend.get("sharded_backend") != FORMAT["sharded_backend"]:
        raise UserError(f"{folder / BACKEND}: not a torch_dist checkpoint; no other format is supported")
    try:
        return _tensors(found, folder)
    except UserError:
        raise
    except (AttributeError, TypeError, KeyError, ValueError) as error:
        raise UserError(f"{path} describes no checkpoint ({_line(error)}); copy the checkpoint again") from None


def _unpickled(content: bytes) -> Any:
    """Loads a pickle. Its memo indices are checked first, because a few bytes could request a memo of gigabytes."""
    for operation, argument, _ in pickletools.genops(content):
        if operation.name in ("PUT", "BINPUT", "LONG_BINPUT") and not 0 <= argument <= len(content):
            raise ValueError(f"memo index {argument} in {len(content)} bytes")
    return _Unpickler(io.BytesIO(content)).load()


def _tensors(found: Any, folder: Path) -> dict[str, StoredTensor]:
    sizes: dict[str, int] = {}
    tensors = {}
    for key, described in found.state_dict_metadata.items():
        if not isinstance(described, metadata.TensorStorageMetadata):
            continue
        pieces = []
        for chunk in described.chunks:
            stored = found.storage_data[metadata.MetadataIndex(key, chunk.offsets)]
            piece = Piece(
                offsets=tuple(map(int, chunk.offsets)),
                sizes=tuple(map(int, chunk.sizes)),
                file=str(stored.relative_path),
                start=int(stored.offset),
                length=int(stored.length),
            )
            _check_piece(piece, key, tuple(described.size), folder, sizes)
            pieces.append(piece)
        shape = tuple(map(int, described.size))
        tensors[key] = StoredTensor(dtype=described.properties.dtype, shape=shape, pieces=tuple(pieces))
        if not isinstance(tensors[key].dtype, torch.dtype):
            raise ValueError(f"{key} has no type")
    return tensors


def _check_piece(piece: Piece, key: str, shape: tuple[int, ...], folder: Path, sizes: dict[str, int]) -> None:
    if Path(piece.file).name != piece.file:
        raise UserError(f"{folder / METADATA} points outside its folder: {piece.file!r}")
    if piece.file not in sizes:
        path = folder / piece.file
        if not path.is_file():
            raise UserError(f"{path} is missing; copy the checkpoint again")
        sizes[piece.file] = path.stat().st_size
    if not 0 <= piece.start <= piece.start + piece.length <= sizes[piece.file]:
        raise UserError(f"{folder / piece.file} is truncated: it ends before the piece of {key}; copy it again")
    inside = all(o >= 0 and s > 0 and o + s <= n for o, s, n in zip(piece.offsets, piece.sizes, shape, strict=True))
    if not inside:
        raise ValueError(f"a piece of {key} lies outside the tensor")


class PieceWriter:
    """Appends pieces to one `.distcp` file. `written` describes them for `write_metadata`."""

    def __init__(self, path: Path):
        self.path = path
        self.written: list[dict[str, Any]] = []
        self._file = open(path, "wb")  # noqa: SIM115 (closed by close)

    def write(self, key: str, shape: Sequence[int], offsets: Sequence[int], tensor: Tensor) -> None:
        """Writes a box of tensor `key`. Missing first axes of `tensor` are added with size 1.

        shape: of the complete tensor `key`. offsets: first element of the box on each axis.
        """
        box = tensor.reshape(*[1] * (len(shape) - tensor.dim()), *tensor.shape)
        if box.untyped_storage().nbytes() != box.nbytes:
            box = box.clone()  # torch.save writes the complete storage behind a view
        start = self._file.tell()
        with _without_crc32():
            torch.save(box, self._file)
        self.written.append(
            {
                "key": key,
                "dtype": str(box.dtype).removeprefix("torch."),
                "shape": list(shape),
                "offsets": list(offsets),
                "sizes": list(box.shape),
                "file": self.path.name,
                "start": start,
                "length": self._file.tell() - start,
            }
        )

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


@contextmanager
def _without_crc32() -> Iterator[None]:
    """Turns off torch.save's checksums, which take most of its time. torch.load ignores them; the manifest has ours."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def write_metadata(
    folder: Path, written: Iterable[dict[str, Any]], common: dict[str, Any], *, empty: Iterable[str] = ()
) -> None:
    """Writes the description of the pieces in `folder`. Megatron's dist_checkpointing can then load them at any layout.

    written: entries of `PieceWriter.written`. empty: names of empty objects, which share one entry of one file.
    """
    described: dict[str, metadata.TensorStorageMetadata | metadata.BytesStorageMetadata] = {}
    storage: dict[metadata.MetadataIndex, filesystem._StorageInfo] = {}
    for piece in written:
        key, offsets = piece["key"], torch.Size(piece["offsets"])
        if key not in described:
            properties = metadata.TensorProperties(dtype=getattr(torch, piece["dtype"]))
            described[key] = metadata.TensorStorageMetadata(properties, torch.Size(piece["shape"]), [])
        if described[key].properties.dtype != getattr(torch, piece["dtype"]):
            raise ValueError(f"{key}: a piece of {piece['dtype']} among others of {described[key].properties.dtype}")
        index = metadata.MetadataIndex(key, offsets, len(described[key].chunks))
        described[key].chunks.append(metadata.ChunkStorageMetadata(offsets, torch.Size(piece["sizes"])))
        storage[index] = filesystem._StorageInfo(piece["file"], piece["start"], piece["length"])
    torch.save([None], folder / EMPTY)  # the form in which Megatron writes an object that is None
    nothing = filesystem._StorageInfo(EMPTY, 0, (folder / EMPTY).stat().st_size)
    for name in empty:
        described[name] = metadata.BytesStorageMetadata()
        storage[metadata.MetadataIndex(name)] = nothing
    torch.save(common, folder / COMMON)
    content = metadata.Metadata(described, planner_data={}, storage_data=storage, storage_meta=metadata.StorageMeta())
    (folder / METADATA).write_bytes(pickle.dumps(content))
    (folder / BACKEND).write_text(json.dumps(FORMAT | COMMON_FORMAT), encoding="utf-8")


def _line(error: BaseException) -> str:
    """The first sentence of an error. torch adds a paragraph of advice to some."""
    if isinstance(error, pickle.UnpicklingError):
        return "torch.save did not write this"
    lines = str(error).strip().splitlines()
    return lines[0].split(". ")[0] if lines else type(error).__name__
