"""Reads Hugging Face folders into a model in memory and writes them from it.

Every rank reads its own slices, and all ranks share the writing.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

from megatron_paint.base.errors import about
from megatron_paint.checkpoints.adapter_reader import Adapter
from megatron_paint.checkpoints.dtypes import cast
from megatron_paint.checkpoints.hf_reader import HuggingFaceReader
from megatron_paint.checkpoints.hf_writer import SHARD_BYTES, copy_companions, name_shards, write_card, write_tensors
from megatron_paint.checkpoints.megatron_source import VOCABULARY
from megatron_paint.checkpoints.peft import ADAPTER_FILE, copy_tokenizer, write_config
from megatron_paint.config.settings import LoraSettings
from megatron_paint.mcore.collectives import fill_folder
from megatron_paint.mcore.lora import gathered_adapters, merged_weight
from megatron_paint.mcore.model import Stage
from megatron_paint.mcore.ranks import Ranks, is_expert
from megatron_paint.mcore.vocabulary import load_vocab_rows
from megatron_paint.models.qwen3.mapping import hugging_face_shapes, rule_of
from megatron_paint.models.shape import ModelShape
from megatron_paint.runtime.files import sync
from megatron_paint.runtime.heartbeat import mark_progress
from megatron_paint.runtime.work import work

WRITER_BYTES = 10**9  # ours: one rank writes about this much of a stage's weights


def base_parameters(stage: Stage) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters of a stage that are in a Hugging Face checkpoint: all except adapters."""
    return ((name, p) for name, p in stage.named_parameters() if "_adapters." not in name)


@torch.no_grad()
def load_stage(
    stage: Stage, folder: str | Path, shape: ModelShape, ranks: Ranks, *, merged: Adapter | None = None
) -> None:
    """Fills every base parameter of this rank's stage from the checkpoint, without communication between ranks.

    merged: an adapter that is added to the weights.
    """
    with about("model.hf_path"):
        reader = HuggingFaceReader(folder, shape)
    read = reader if merged is None else merged.merged(reader)
    first_expert = ranks.first_expert(shape.num_experts)
    for name, parameter in _counted(list(base_parameters(stage)), "loading"):
        rule = rule_of(name, shape, first_expert=first_expert)
        if name in VOCABULARY:
            value = load_vocab_rows(rule, read, ranks)
        else:
            shards = ranks.shards_of(name)
            value = rule.load(read, rank=shards.rank, ranks=shards.size)
        if value.shape != parameter.shape:
            raise AssertionError(f"{name}: rule returns {tuple(value.shape)}, parameter is {tuple(parameter.shape)}")
        parameter.copy_(value)
    reader.close()


def gathered_tensors(
    named: Iterable[tuple[str, Tensor]],
    shape: ModelShape,
    ranks: Ranks,
    *,
    writers: int = 1,
    prepare: Callable[[str, Tensor], Tensor] = lambda name, value: value,
) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face tensors of this stage, one after another, each on one of `writers` ranks in turn.

    The writers are the ranks of the first copy of the weights, then those of the next. Each rank's experts are written
    by the ranks that have shards of them. prepare: applied to each shard before it is gathered. All ranks of the stage
    must iterate together. A tied copy of the embedding is left out.
    """
    first_expert = ranks.first_expert(shape.num_experts)
    for number, (name, value) in enumerate(named):
        shards = ranks.shards_of(name)
        most = writers // ranks.ep_size if is_expert(name) else writers
        replica, owner = divmod(number % max(1, min(most, shards.size * shards.replicas)), shards.size)
        if replica != shards.replica or (name == "output_layer.weight" and shape.tied):
            continue
        value = prepare(name, value)
        parts = [value]
        if shards.size > 1:
            parts = [torch.empty_like(value) for _ in range(shards.size)] if shards.rank == owner else None
            dist.gather(value.contiguous(), parts, group_dst=owner, group=shards.group)
        if shards.rank == owner:
            yield from rule_of(name, shape, first_expert=first_expert).unload(parts).items()


@torch.no_grad()
def export_stage(
    stage: Stage,
    out: str | Path,
    *,
    shape: ModelShape,
    ranks: Ranks,
    dtype: torch.dtype,
    source: str | Path,
    tokenizer: str | Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    card: str | None = None,
) -> None:
    """Writes a Hugging Face folder from the model in memory, adapters merged; `out` appears complete or not at all.

    Ranks share the writing of a large model; no rank holds more than the content of one file. Config, tokenizer and
    chat template are copied from `source`, the checkpoint that the run started from. tokenizer: a folder whose
    tokenizer files replace those of `source`. card: the text of the model card; None: that of `source`.
    """
    share = shape.num_parameters * dtype.itemsize / ranks.pp_size / WRITER_BYTES
    writers = max(1, min(ranks.tp_size * ranks.dp_cp_size, round(share)))

    def write(folder: Path) -> dict[str, dict[str, int]]:
        tensors = gathered_tensors(
            _counted(list(base_parameters(stage)), "exporting"),
            shape,
            ranks,
            writers=writers,
            prepare=partial(merged_weight, stage),
        )
        stem = f"stage{ranks.pp_rank:03d}-copy{ranks.dp_cp_rank:04d}-rank{ranks.tp_rank:02d}"
        return _write_shards(tensors, folder, stem=stem, dtype=dtype, shard_bytes=shard_bytes)

    def finish(folder: Path, written: list[dict[str, dict[str, int]]]) -> None:
        files = {file: sizes for part in written for file, sizes in part.items()}
        names = sorted(name for sizes in files.values() for name in sizes)
        if names != sorted(hugging_face_shapes(shape)):
            raise AssertionError(f"the ranks wrote {len(names)} tensors, not each of the model's once")
        name_shards(folder, files)
        with about("model.hf_path"):
            copy_companions(Path(source), folder, dtype=dtype)
        if tokenizer is not None:
            copy_tokenizer(Path(tokenizer), folder)
        write_card(folder, card)

    fill_folder(out, ranks, write=write, finish=finish)


def export_adapters(
    stage: Stage,
    out: str | Path,
    *,
    lora: LoraSettings,
    ranks: Ranks,
    source: str | Path,
    tokenizer: str | Path | None = None,
    card: str | None = None,
) -> None:
    """Writes the adapters as a PEFT folder for the model in `source`; `out` appears complete or not at all.

    Tokenizer and chat template are copied from `source`, and from the folder `tokenizer` over them. card: the text of
    the model card; None: no card.

    Each stage writes its own file, and the first rank merges them: PEFT reads only one.
    """

    def write(folder: Path) -> str | None:
        tensors = dict(gathered_adapters(stage, ranks))
        if ranks.dp_cp_rank > 0 or ranks.tp_rank > 0:
            return None
        file = f"stage{ranks.pp_rank:03d}.safetensors"
        write_tensors(folder / file, {name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
        return file

    def finish(folder: Path, written: list[str | None]) -> None:
        parts = [folder / file for file in written if file is not None]
        tensors = {name: tensor for part in parts for name, tensor in load_file(part).items()}
        write_tensors(folder / ADAPTER_FILE, tensors)
        write_config(
            folder,
            rank=lora.rank,
            alpha=lora.alpha,
            base=os.path.abspath(source),
            mixture=bool(stage.config.num_moe_experts),
            experts=lora.experts,
        )
        for folder_of in (source, tokenizer):
            if folder_of is not None:
                copy_tokenizer(Path(folder_of), folder)
        write_card(folder, card)
        for part in parts:
            part.unlink()

    fill_folder(out, ranks, write=write, finish=finish)


def _counted(named: Sequence[tuple[str, Tensor]], what: str) -> Iterator[tuple[str, Tensor]]:
    """The same, as work that displays show and that the watchdog sees."""
    with work(what, total=sum(tensor.nbytes for _, tensor in named), unit="bytes") as begun:
        for name, tensor in named:
            yield name, tensor
            begun.advance(tensor.nbytes)
            mark_progress()


def _write_shards(
    tensors: Iterator[tuple[str, Tensor]], folder: Path, *, stem: str, dtype: torch.dtype, shard_bytes: int
) -> dict[str, dict[str, int]]:
    """Writes files of at most `shard_bytes` (or one tensor); returns {file: {tensor: bytes}}."""
    written: dict[str, dict[str, int]] = {}
    pending: dict[str, Tensor] = {}

    def flush() -> None:
        if pending:
            file = f"{stem}-{len(written):05d}.safetensors"
            write_tensors(folder / file, pending)
            sync(folder / file)
            written[file] = {name: tensor.nbytes for name, tensor in pending.items()}
            pending.clear()

    try:
        for name, tensor in tensors:
            tensor = cast(tensor.cpu(), dtype, name).contiguous()
            if pending and sum(t.nbytes for t in pending.values()) + tensor.nbytes > shard_bytes:
                flush()
            pending[name] = tensor
        flush()
    except Exception:
        for _ in tensors:  # all ranks of the stage gather together: without this the others would wait
            pass
        raise
    return written
