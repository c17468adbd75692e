"""Reading and writing Hugging Face checkpoint folders: ranks read only their slices, and write their stage."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from megatron_paint.disk import sync
from megatron_paint.errors import UserError
from megatron_paint.mcore.agree import fill_folder
from megatron_paint.mcore.mapping import Rule, hugging_face_shapes, rule_of
from megatron_paint.mcore.world import World
from megatron_paint.qwen3 import Qwen3Shape

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class HuggingFaceReader:
    """Slices of the tensors of a safetensors checkpoint, sharded or in one file.

    Opening it checks that exactly the tensors of `shape` are there with their shapes; UserError says what is not.
    """

    def __init__(self, folder: str | Path, shape: Qwen3Shape):
        self.folder = Path(folder)
        self._file_of = self._locate()
        self._open = {name: self._open_file(name) for name in sorted(set(self._file_of.values()))}
        self._check(shape)

    def __call__(self, name: str, *, rows: slice = slice(None), columns: slice | None = None) -> Tensor:
        """Rows and columns of tensor `name`, on the CPU, in the checkpoint's type."""
        view = self._open[self._file_of[name]].get_slice(name)
        return view[rows] if columns is None else view[rows, columns]

    def _locate(self) -> dict[str, str]:
        index = self.folder / INDEX
        if not index.exists():
            if not (self.folder / SINGLE).exists():
                pickled = " (.bin files are not read: convert them to safetensors)" * any(self.folder.glob("*.bin"))
                raise UserError(f"model.hf_path: {self.folder} has neither {SINGLE} nor {INDEX}{pickled}")
            return dict.fromkeys(self._open_file(SINGLE).keys(), SINGLE)
        try:
            files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise UserError(f"model.hf_path: {index} is not a safetensors index ({error!r}); copy it again") from None
        for file in sorted(set(files.values())):
            if Path(file).name != file:
                raise UserError(f"model.hf_path: {index} points outside its folder: {file!r}")
        return files

    def _open_file(self, name: str):
        path = self.folder / name
        try:
            return safe_open(path, framework="pt")
        except FileNotFoundError:
            raise UserError(f"model.hf_path: shard {path} is missing; download the checkpoint again") from None
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"model.hf_path: {path} is truncated or not a safetensors file ({error}); download it again"
            ) from None

    def _check(self, shape: Qwen3Shape) -> None:
        expected = hugging_face_shapes(shape)
        missing = sorted(expected.keys() - self._file_of.keys())
        surplus = sorted(self._file_of.keys() - expected.keys() - ({"lm_head.weight"} if shape.tied else set()))
        for names, what in ((missing, "lacks"), (surplus, "has tensors that no Qwen3 of its config has:")):
            if names:
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                raise UserError(f"model.hf_path: {self.folder} {what} {', '.join(names[:3])}{more}")
        for name, wanted in expected.items():
            file = self._open[self._file_of[name]]
            if name not in file.keys():  # noqa: SIM118 (safe_open is not a dict)
                raise UserError(f"model.hf_path: {INDEX} says that {self._file_of[name]} holds {name}; it does not")
            found = tuple(file.get_slice(name).get_shape())
            if found != tuple(wanted):
                raise UserError(
                    f"model.hf_path: {name} in {self.folder} has shape {found}, its config.json says {tuple(wanted)}"
                )


def base_parameters(stage: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters of a stage that are in a Hugging Face checkpoint: all but adapters."""
    return ((name, p) for name, p in stage.named_parameters() if "_adapters." not in name)


def first_layer_of(stage: nn.Module) -> int:
    """Global index, from 0, of a stage's first layer."""
    return stage.decoder.layers[0].layer_number - 1


@torch.no_grad()
def load_stage(stage: nn.Module, folder: str | Path, shape: Qwen3Shape, world: World) -> None:
    """Fills every base parameter of this rank's stage from its own slices of the checkpoint."""
    read = HuggingFaceReader(folder, shape)
    for name, parameter in base_parameters(stage):
        rule = rule_of(name, shape, first_layer=first_layer_of(stage))
        try:
            value = rule.load(read, rank=world.tp_rank, ranks=world.tp_size)
        except SafetensorError as error:
            raise UserError(f"model.hf_path: cannot read {sorted(rule.shapes())} of {folder} ({error})") from None
        if value.shape != parameter.shape:
            raise AssertionError(f"{name}: rule gives {tuple(value.shape)}, parameter is {tuple(parameter.shape)}")
        parameter.copy_(value)


def gathered_tensors(
    named: Iterable[tuple[str, Tensor]], shape: Qwen3Shape, world: World, *, first_layer: int
) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face tensors of this stage, one after another, on tensor-parallel rank 0; others yield nothing.

    All tensor-parallel ranks of the stage must iterate together. A tied copy of the embedding is left out.
    """
    for name, value in named:
        if name == "output_layer.weight" and shape.tied:
            continue
        rule: Rule = rule_of(name, shape, first_layer=first_layer)
        shards = [torch.empty_like(value) for _ in range(world.tp_size)] if world.tp_rank == 0 else None
        if world.tp_size == 1:
            shards = [value]
        else:
            dist.gather(value.contiguous(), shards, group_dst=0, group=world.tp_group)
        if world.tp_rank == 0:
            yield from rule.unload(shards).items()


@torch.no_grad()
def export_stages(
    named: Iterable[tuple[str, Tensor]],
    out: str | Path,
    *,
    shape: Qwen3Shape,
    world: World,
    first_layer: int,
    dtype: torch.dtype,
    source: str | Path,
    shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes a Hugging Face folder from a live run; `out` appears complete or not at all.

    Tensor-parallel rank 0 of each stage of the first replica writes its stage's shards; the other files (config,
    tokenizer, chat template) are copied from `source`, the checkpoint that the run started from.
    """

    def write(folder: Path) -> dict[str, dict[str, int]]:
        if world.dp_rank != 0:
            return {}
        tensors = gathered_tensors(named, shape, world, first_layer=first_layer)
        return _write_shards(tensors, folder, stage=world.pp_rank, dtype=dtype, shard_bytes=shard_bytes)

    def finish(folder: Path, written: list[dict[str, dict[str, int]]]) -> None:
        _finish_folder(folder, {k: v for files in written for k, v in files.items()}, source, dtype)

    fill_folder(out, world, write=write, finish=finish)


def _write_shards(tensors, folder: Path, *, stage: int, dtype: torch.dtype, shard_bytes: int) -> dict:
    """Writes files of at most `shard_bytes` (or one tensor); returns {file: {tensor: bytes}}."""
    written: dict[str, dict[str, int]] = {}
    pending: dict[str, Tensor] = {}

    def flush() -> None:
        if pending:
            file = f"stage{stage:03d}-{len(written):05d}.safetensors"
            save_file(pending, folder / file, metadata={"format": "pt"})
            sync(folder / file)
            written[file] = {name: tensor.nbytes for name, tensor in pending.items()}
            pending.clear()

    tensors = iter(tensors)
    try:
        for name, tensor in tensors:
            tensor = tensor.to(device="cpu", dtype=dtype).contiguous()
            if pending and sum(t.nbytes for t in pending.values()) + tensor.nbytes > shard_bytes:
                flush()
            pending[name] = tensor
        flush()
    except Exception:
        for _ in tensors:  # the ranks of the stage gather together: the others would wait for this one
            pass
        raise
    return written


def _finish_folder(folder: Path, sizes: dict[str, dict[str, int]], source: str | Path, dtype: torch.dtype) -> None:
    """Gives the shards their final names, writes the index and copies everything that is not weights."""
    files = sorted(sizes)
    weight_map = {}
    for number, file in enumerate(files, start=1):
        final = SINGLE if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        os.replace(folder / file, folder / final)
        weight_map |= dict.fromkeys(sizes[file], final)
    if len(files) > 1:
        total = sum(size for tensors in sizes.values() for size in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    config = _copy_other_files(Path(source), folder)
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    config[key] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _copy_other_files(source: Path, folder: Path) -> dict[str, Any]:
    """Copies the content, not the permissions, of what is not weights; returns config.json."""
    try:
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        paths = [path for path in source.iterdir() if path.is_file() and path.name != INDEX]
    except (OSError, ValueError) as error:
        raise UserError(f"model.hf_path: {source} cannot be read ({error}); an export copies from it") from error
    for path in paths:
        if path.suffix not in (".safetensors", ".bin", ".pt"):
            shutil.copyfile(path, folder / path.name)
    return config
