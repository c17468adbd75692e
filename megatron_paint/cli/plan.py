"""`megatron-paint plan`: which layout of a model on given GPUs is the fastest one that fits."""

import argparse
import dataclasses
from collections.abc import Iterator

from megatron_paint.base.errors import UserError
from megatron_paint.base.json_text import to_json
from megatron_paint.planning.search import report
from megatron_paint.planning.search.advice import nothing_fits
from megatron_paint.planning.search.machines import known_gpus
from megatron_paint.planning.search.question import Asked, question_of
from megatron_paint.planning.search.search import Found, Question, search
from megatron_paint.planning.search.servers import server_lines


def run(options: argparse.Namespace, _: list[str]) -> int:
    """Searches and prints; returns the exit status. UserError: a wrong option, or nothing fits."""
    if options.gpu_list:
        print("\n".join(_gpu_lines()))
        return 0
    for name, value in (("MODEL", options.model), ("--gpus", options.gpus), ("--gpu", options.gpu)):
        if value is None:
            raise UserError(f"{name} is missing: megatron-paint plan qwen3_8b --gpus 8 --gpu h100-80")
    if options.top < 1:
        raise UserError(f"--top={options.top}: give the number of layouts in the table, 1 or more")
    names = {field.name for field in dataclasses.fields(Asked)}
    asked = Asked(**{name: value for name, value in vars(options).items() if name in names})
    question = question_of(asked)
    found = search(question, top=options.top)
    if not found.ranked:
        raise nothing_fits(question, found)
    _print(options, question, found)
    return 0


def _print(options: argparse.Namespace, question: Question, found: Found) -> None:
    text = report.settings_text(question, found.ranked[0], config=options.config, file=options.yaml, name=options.model)
    if options.yaml is not None:
        _write(options, text)
    if options.json:
        print(to_json(report.as_json(question, found), indent=1))
        return
    print("\n".join(report.lines(question, found)))
    if options.yaml is None:
        print(f"\nsettings of 1:\n\n{text}", end="")
    else:
        print(f"\nsettings of 1: {options.yaml}")
    if options.slurm:
        file = str(options.yaml or "SETTINGS.yaml")
        hf_path = None if options.config else options.model  # a settings file names its own
        print(f"\nslurm      {report.slurm_command(question, settings_file=file, hf_path=hf_path)}")
    servers = list(server_lines(question.settings, question.shape, question.machine.gpu, gpus=question.sampling_gpus))
    if servers:
        print("\n".join(servers if options.slurm else ["", *servers]))


def _write(options: argparse.Namespace, text: str) -> None:
    try:
        options.yaml.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--yaml={options.yaml} cannot be written ({error.strerror})") from None


def _gpu_lines() -> Iterator[str]:
    for name, gpu in known_gpus().items():
        fp8 = "none" if gpu.fp8 is None else f"{gpu.fp8 / 1e12:,.0f}"
        yield (
            f"{name:9} {gpu.memory / 1e9:.0f} GB, {gpu.hbm / 1e12:g} TB/s; TFLOP/s: {gpu.bf16 / 1e12:,.0f} bfloat16, "
            f"{fp8} FP8; GB/s: {gpu.nvlink / 1e9:.0f} NVLink, {gpu.network / 1e9:.0f} network, "
            f"{gpu.host / 1e9:.0f} host; {gpu.gpus_per_node} a node. {gpu.source}"
        )
