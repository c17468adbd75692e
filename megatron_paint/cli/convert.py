"""Runs `megatron-paint convert to-megatron | to-hf | check | inspect` and tools/convert_qwen3.py."""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from megatron_paint.base.counts import agreeing, count_text
from megatron_paint.base.errors import UserError
from megatron_paint.checkpoints.hf_reader import HuggingFaceReader
from megatron_paint.checkpoints.hf_writer import SHARD_BYTES
from megatron_paint.checkpoints.hub import local_folder
from megatron_paint.checkpoints.megatron_folder import megatron_folder
from megatron_paint.convert.check import Comparison, compare, describe
from megatron_paint.convert.folders import check_folder
from megatron_paint.convert.to_hf import ToAdapter, ToHuggingFace
from megatron_paint.convert.to_megatron import ToMegatron
from megatron_paint.convert.work import Job, convert, processes_for
from megatron_paint.report.model_card import card_of_checkpoint

DIFFERENCES_SHOWN = 10


def run_to_megatron(options: argparse.Namespace) -> int:
    """Converts to Megatron and returns the exit status 0. Raises UserError if the conversion is not possible."""
    options.source = local_folder(options.source)
    check_folder(options.source)
    return _convert(ToMegatron(source=options.source, dtype=options.dtype, checksums=options.checksums), options)


def run_to_hf(options: argparse.Namespace) -> int:
    """Converts to Hugging Face and returns the exit status 0. Raises UserError if the conversion is not possible."""
    options.base = local_folder(options.base)
    for folder in (options.source, options.base):
        check_folder(folder)
    if options.lora == "adapter" and options.shard_size is not None:
        raise UserError("--shard-size: PEFT reads adapters from one file; leave this option out")
    options.source = megatron_folder(options.source)
    card = card_of_checkpoint(options.source, options.base, adapter=options.lora == "adapter")
    if options.lora == "adapter":
        return _convert(ToAdapter(source=options.source, base=options.base, dtype=options.dtype, card=card), options)
    job = ToHuggingFace(
        source=options.source,
        base=options.base,
        dtype=options.dtype,
        shard_bytes=options.shard_size or SHARD_BYTES,
        checksums=options.checksums,
        card=card,
    )
    return _convert(job, options)


def _convert(job: Job, options: argparse.Namespace) -> int:
    started = time.monotonic()
    total = sum(task.nbytes for task in job.tasks())
    processes, notes = processes_for(total, options.processes), list(job.notes())
    steps: list[int] = []  # bytes; the first entry is what an interrupted conversion has done
    with _progress(f"{options.source.name} -> {options.out.name}", total, options) as advance:

        def progress(nbytes: int) -> None:
            steps.append(nbytes)
            advance(nbytes)

        records = convert(job, options.out, processes=processes, overwrite=options.overwrite, progress=progress)
    seconds = time.monotonic() - started
    tensors = sum(len(record.get("tensors", {})) for record in records)
    summary = {"out": str(options.out), "tensors": tensors, "bytes": total, "seconds": round(seconds, 3)}
    summary |= {"resumed_bytes": steps[0], "notes": notes}
    if options.json:
        print(json.dumps(summary | {"bytes_per_second": round(total / seconds) if seconds else None}))
    elif not options.quiet:
        print(
            "\n".join(
                [*notes, f"{options.out}: {count_text(tensors, 'tensor')}, {total / 1e9:.3g} GB in {seconds:.1f} s"]
            )
        )
    return 0


def run_check(options: argparse.Namespace) -> int:
    """Compares two checkpoints. Returns the exit status: 0 if they are equal, 1 if they differ."""
    options.hf = local_folder(options.hf)
    for folder in (options.hf, options.megatron):
        check_folder(folder)
    options.megatron = megatron_folder(options.megatron)
    total = sum(place.nbytes for place in HuggingFaceReader(options.hf).tensors.values())
    with _progress("comparing", total, options) as advance:
        found = compare(options.hf, options.megatron, progress=advance)
    if options.json:
        print(json.dumps(_as_json(found)))
    elif not options.quiet or not found.equal:
        print("\n".join(_lines(found)))
    return 0 if found.equal else 1


def _as_json(found: Comparison) -> dict[str, Any]:
    differences = [vars(difference) for difference in found.differences]
    return {
        "equal": found.equal,
        "tensors": found.tensors,
        "bytes": found.nbytes,
        "differences": differences,
        "bad_checksums": [{"name": name, "folder": folder} for name, folder in found.bad_checksums],
        "checksums": found.checksums,
        "rounded": found.rounded,
        "notes": list(found.notes),
    }


def _lines(found: Comparison) -> Iterator[str]:
    yield from found.notes
    if found.equal:
        how = (
            f"after rounding {found.rounded} of them to the narrower of their two types"
            if found.rounded
            else "bit for bit"
        )
        yield (
            f"equal: {count_text(found.tensors, 'tensor')}, {found.nbytes / 1e9:.3g} GB, {how}; {found.checksums} "
            "compared with the checksums of the conversion"
        )
        return
    worst = sorted(found.differences, key=lambda difference: -difference.largest)
    for difference in worst[:DIFFERENCES_SHOWN]:
        at = ", ".join(map(str, difference.where))
        yield (
            f"{difference.name}: {count_text(difference.unequal, 'number')} "
            f"{agreeing(difference.unequal, 'differs', 'differ')}; the largest difference is {difference.largest:.3g}, "
            f"at [{at}]"
        )
    if len(worst) > DIFFERENCES_SHOWN:
        yield f"and {count_text(len(worst) - DIFFERENCES_SHOWN, 'more tensor')}"
    for name, folder in found.bad_checksums[:DIFFERENCES_SHOWN]:
        yield f"{name}: {folder} differs from its manifest; it was changed after the conversion"
    unequal = count_text(found.tensors, "tensor")
    yield f"not equal: {len(worst)} of {unequal} {agreeing(len(worst), 'differs', 'differ')}"


def run_inspect(options: argparse.Namespace) -> int:
    """Prints the description of a checkpoint and returns the exit status 0."""
    check_folder(options.path)
    found = describe(megatron_folder(options.path))
    if options.json:
        print(json.dumps(found))
        return 0
    table = Table(show_header=False, box=None)
    for name, value in found.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {item}" for key, item in value.items())
        elif isinstance(value, list):
            value = "; ".join(value) or "nothing"
        table.add_row(name.replace("_", " "), f"{value:,}" if type(value) is int else escape(str(value)))
    Console(highlight=False, emoji=False).print(table)
    return 0


@contextmanager
def _progress(title: str, total: int, options: argparse.Namespace) -> Iterator[Callable[[int], None]]:
    """Shows a bar with bytes a second and the remaining time, unless --quiet or --json is given."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(
        *columns,
        TimeRemainingColumn(),
        console=Console(stderr=True, emoji=False),
        disable=options.quiet or options.json,
    ) as bar:
        task = bar.add_task(title, total=total)
        yield lambda nbytes: bar.advance(task, nbytes)
