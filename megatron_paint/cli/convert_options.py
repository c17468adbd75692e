"""The options of `megatron-paint convert` and tools/convert_qwen3.py. torch is imported only when an action runs."""

import argparse
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from megatron_paint.base.errors import UserError

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def add_commands(commands: Any) -> None:
    """Adds the four actions to a parser's subparsers."""
    to_megatron = commands.add_parser("to-megatron", help="a Hugging Face folder to a checkpoint for any layout")
    to_megatron.add_argument("source", type=Path, metavar="HF_DIR")
    to_megatron.add_argument("out", type=Path, metavar="OUT")
    _add_conversion(to_megatron)
    to_megatron.set_defaults(run=_run("run_to_megatron"))

    to_hf = commands.add_parser("to-hf", help="a Megatron checkpoint to a folder for transformers and vLLM")
    to_hf.add_argument("source", type=Path, metavar="MEGATRON_CKPT")
    to_hf.add_argument("out", type=Path, metavar="OUT")
    to_hf.add_argument("--base", type=Path, required=True, metavar="HF_DIR", help="config, tokenizer, chat template")
    to_hf.add_argument(
        "--lora", choices=("merged", "adapter"), default="merged", help="merge adapters, or write them alone"
    )
    to_hf.add_argument("--shard-size", type=_size, metavar="SIZE", help="size of the largest file (5GB)")
    _add_conversion(to_hf)
    to_hf.set_defaults(run=_run("run_to_hf"))

    check = commands.add_parser(
        "check", help="compare a Hugging Face folder and a Megatron checkpoint number by number"
    )
    check.add_argument("hf", type=Path, metavar="HF_DIR")
    check.add_argument("megatron", type=Path, metavar="MEGATRON_CKPT")
    _add_console(check)
    check.set_defaults(run=_run("run_check"))

    inspect = commands.add_parser("inspect", help="print sizes, types, layout and odd findings of a checkpoint")
    inspect.add_argument("path", type=Path, metavar="PATH")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.set_defaults(run=_run("run_inspect"))


def _add_conversion(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="default: the type of the source")
    parser.add_argument("--processes", type=int, help="default: one for each core, at most 8, fewer for a small model")
    parser.add_argument("--no-checksums", dest="checksums", action="store_false", help="compute no SHA-256")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT when the new checkpoint is complete")
    _add_console(parser)


def _add_console(parser: argparse.ArgumentParser) -> None:
    console = parser.add_mutually_exclusive_group()
    console.add_argument("--quiet", action="store_true", help="print only errors")
    console.add_argument("--json", action="store_true", help="print one JSON object at the end")


def _size(text: str) -> int:
    unit = next((unit for unit in UNITS if text.upper().endswith(unit)), None)
    number = text[: -len(unit)] if unit else text
    if not number.replace(".", "", 1).isdigit() or float(number) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 5GB or 500MB")
    return int(float(number) * UNITS.get(unit, 1))


def _run(name: str) -> Callable[[argparse.Namespace, list[str]], int]:
    def run(options: argparse.Namespace, arguments: list[str]) -> int:
        return getattr(import_module("megatron_paint.cli.convert"), name)(options)

    return run


def main(arguments: list[str] | None = None) -> int:
    """Runs the stand-alone command and returns its exit status."""
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
        print("convert_qwen3.py: interrupted; the same command resumes the conversion", file=sys.stderr)
        return 130
