"""`megatron-paint convert to-megatron | to-hf | check | inspect`, and tools/convert_qwen3.py: the same code."""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from megatron_paint.convert.check import Comparison, compare, describe
from megatron_paint.convert.hf_reader import HuggingFaceReader
from megatron_paint.convert.to_hf import ToAdapter, ToHuggingFace
from megatron_paint.convert.to_megatron import ToMegatron
from megatron_paint.convert.work import Job, convert, processes_or_cores
from megatron_paint.errors import UserError

SHOWN = 10  # differences that are listed
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def add_commands(commands: Any) -> None:
    """Adds the four actions to a parser's subparsers."""
    to_megatron = commands.add_parser("to-megatron", help="a Hugging Face folder to a checkpoint that any layout loads")
    to_megatron.add_argument("source", type=Path, metavar="HF_DIR")
    to_megatron.add_argument("out", type=Path, metavar="OUT")
    _add_conversion(to_megatron)
    to_megatron.set_defaults(run=run_to_megatron)

    to_hf = commands.add_parser("to-hf", help="a Megatron checkpoint to a folder that transformers and vLLM load")
    to_hf.add_argument("source", type=Path, metavar="MEGATRON_CKPT")
    to_hf.add_argument("out", type=Path, metavar="OUT")
    to_hf.add_argument("--base", type=Path, required=True, metavar="HF_DIR", help="config, tokenizer, chat template")
    to_hf.add_argument("--lora", choices=("merged", "adapter"), default="merged", help="what becomes of adapters")
    to_hf.add_argument("--shard-size", type=_size, default=5 * 10**9, metavar="5GB", help="largest file")
    _add_conversion(to_hf)
    to_hf.set_defaults(run=run_to_hf)

    check = commands.add_parser(
        "check", help="compare a Hugging Face folder and a Megatron checkpoint number by number"
    )
    check.add_argument("hf", type=Path, metavar="HF_DIR")
    check.add_argument("megatron", type=Path, metavar="MEGATRON_CKPT")
    _add_console(check)
    check.set_defaults(run=run_check)

    inspect = commands.add_parser("inspect", help="sizes, types, layout of a checkpoint, and what is odd")
    inspect.add_argument("path", type=Path, metavar="PATH")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.set_defaults(run=run_inspect)


def _add_conversion(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="default: the source's own")
    parser.add_argument("--processes", type=int, help="default: one a core, at most 8")
    parser.add_argument("--no-checksums", dest="checksums", action="store_false", help="leave SHA-256 out")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists, once the new one is whole")
    _add_console(parser)


def _add_console(parser: argparse.ArgumentParser) -> None:
    console = parser.add_mutually_exclusive_group()
    console.add_argument("--quiet", action="store_true", help="print errors alone")
    console.add_argument("--json", action="store_true", help="print one JSON object at the end")


def _size(text: str) -> int:
    unit = next((unit for unit in UNITS if text.upper().endswith(unit)), None)
    number = text[: -len(unit)] if unit else text
    if not number.replace(".", "", 1).isdigit() or float(number) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 5GB or 500MB")
    return int(float(number) * UNITS.get(unit, 1))


def run_to_megatron(options: argparse.Namespace, _: list[str]) -> int:
    _check_folder(options.source)
    return _convert(ToMegatron(source=options.source, dtype=options.dtype, checksums=options.checksums), options)


def run_to_hf(options: argparse.Namespace, _: list[str]) -> int:
    for folder in (options.source, options.base):
        _check_folder(folder)
    if options.lora == "adapter":
        return _convert(ToAdapter(source=options.source, base=options.base), options)
    job = ToHuggingFace(
        source=options.source,
        base=options.base,
        dtype=options.dtype,
        shard_bytes=options.shard_size,
        checksums=options.checksums,
    )
    return _convert(job, options)


def _check_folder(path: Path) -> None:
    if not path.is_dir():
        raise UserError(f"{path} is not a folder")


def _convert(job: Job, options: argparse.Namespace) -> int:
    processes = processes_or_cores(options.processes)
    started = time.monotonic()
    total = sum(task.nbytes for task in job.tasks())
    with _progress(f"{options.source.name} -> {options.out.name}", total, options) as advance:
        records = convert(job, options.out, processes=processes, overwrite=options.overwrite, progress=advance)
    seconds = time.monotonic() - started
    tensors = sum(len(record.get("tensors", {})) for record in records)
    summary = {"out": str(options.out), "tensors": tensors, "bytes": total, "seconds": round(seconds, 3)}
    if options.json:
        print(json.dumps(summary | {"bytes_per_second": round(total / seconds) if seconds else None}))
    elif not options.quiet:
        print(f"{options.out}: {tensors} tensors, {total / 1e9:.3g} GB in {seconds:.1f} s")
    return 0


def run_check(options: argparse.Namespace, _: list[str]) -> int:
    """0 where both are the same, 1 where not."""
    for folder in (options.hf, options.megatron):
        _check_folder(folder)
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
        "bad_checksums": list(found.bad_checksums),
        "checksums": found.checksums,
    }


def _lines(found: Comparison) -> Iterator[str]:
    if found.equal:
        manifest = "; checksums of the manifest hold" if found.checksums else "; there is no manifest with checksums"
        yield f"equal: {found.tensors} tensors, {found.nbytes / 1e9:.3g} GB, bit for bit{manifest}"
        return
    worst = sorted(found.differences, key=lambda difference: -difference.largest)
    for difference in worst[:SHOWN]:
        at = ", ".join(map(str, difference.where))
        yield f"{difference.name}: {difference.unequal} numbers differ, most at [{at}], by {difference.largest:.3g}"
    if len(worst) > SHOWN:
        yield f"and {len(worst) - SHOWN} more tensors"
    for name in found.bad_checksums[:SHOWN]:
        yield f"{name}: the Megatron checkpoint is not what its manifest says; it was changed after the conversion"
    yield f"not equal: {len(worst)} of {found.tensors} tensors differ"


def run_inspect(options: argparse.Namespace, _: list[str]) -> int:
    _check_folder(options.path)
    found = describe(options.path)
    if options.json:
        print(json.dumps(found))
        return 0
    table = Table(show_header=False, box=None)
    for name, value in found.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {item}" for key, item in value.items())
        elif isinstance(value, list):
            value = "; ".join(value) or "nothing"
        table.add_row(name.replace("_", " "), f"{value:,}" if type(value) is int else str(value))
    Console(highlight=False).print(table)
    return 0


@contextmanager
def _progress(title: str, total: int, options: argparse.Namespace) -> Iterator[Callable[[int], None]]:
    """A bar with bytes a second and the time left, where someone is looking."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(
        *columns, TimeRemainingColumn(), console=Console(stderr=True), disable=options.quiet or options.json
    ) as bar:
        task = bar.add_task(title, total=total)
        yield lambda nbytes: bar.advance(task, nbytes)


def main(arguments: list[str] | None = None) -> int:
    """The stand-alone command; the exit status."""
    import sys

    parser = argparse.ArgumentParser(
        prog="convert_qwen3.py", description="Qwen3 checkpoints: Hugging Face <-> Megatron"
    )
    add_commands(parser.add_subparsers(required=True, metavar="ACTION"))
    options = parser.parse_args(arguments)
    try:
        return options.run(options, [])
    except UserError as error:
        print(f"convert_qwen3.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("convert_qwen3.py: interrupted; the same command goes on where it ended", file=sys.stderr)
        return 130
