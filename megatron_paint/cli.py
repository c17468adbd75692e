"""The command line: `megatron-paint train | evaluate | inspect | doctor`. Exit status 2 is an error of the user's."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_paint import __version__
from megatron_paint.errors import UserError

if TYPE_CHECKING:
    from megatron_paint.config import Settings
    from megatron_paint.plan import Plan


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; its exit status. A UserError becomes one line on stderr, without a traceback."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = make_parser().parse_args(arguments)
    try:
        return options.run(options, arguments)
    except UserError as error:
        message = f"megatron-paint: error: {error}"
        from megatron_paint.launch.local import tell_launcher

        if not tell_launcher(message):
            print(message, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def make_parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    parser = argparse.ArgumentParser(prog="megatron-paint", description="PAINT on Megatron-Core")
    parser.add_argument("--version", action="version", version=f"megatron-paint {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train from a settings file")
    _add_settings(train)
    train.add_argument("--dry-run", action="store_true", help="check everything, print sizes and memory, and end")
    train.add_argument("--self-check", action="store_true", help="score the model against itself, and end")
    train.set_defaults(run=run_train)

    evaluate = commands.add_parser("evaluate", help="evaluate the model of a settings file on its held-out problems")
    _add_settings(evaluate)
    evaluate.add_argument("--out", type=Path, help="write the report to this JSON file")
    evaluate.set_defaults(run=run_evaluate)

    inspect = commands.add_parser("inspect", help="look into a run folder")
    things = inspect.add_subparsers(required=True, metavar="WHAT")
    samples = things.add_parser("samples", help="one sample of a step: what was hidden, found and selected")
    samples.add_argument("run_dir", type=Path, metavar="RUN")
    samples.add_argument("step", type=int, metavar="STEP")
    samples.add_argument("--index", type=int, default=0, help="which sample of the step, from 0")
    samples.add_argument("--id", help="the sample of this problem instead")
    samples.set_defaults(run=run_inspect)

    doctor = commands.add_parser("doctor", help="what was found on this machine, and what lacking it costs")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.set_defaults(run=run_doctor)
    return parser


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="SETTINGS.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as optimizer.lr=1e-5")
    parser.add_argument(
        "--processes", type=int, help="ranks to start here; default: one a GPU, or one replica without GPUs"
    )
    console = parser.add_mutually_exclusive_group()
    console.add_argument("--quiet", action="store_true", help="only warnings and the final table")
    console.add_argument("--json", action="store_true", help="one JSON object per event")


def _mode(options: argparse.Namespace) -> str:
    return "quiet" if options.quiet else "json" if options.json else "normal"


def run_train(options: argparse.Namespace, arguments: list[str]) -> int:
    """Checks the settings before any process is started; then trains here, or starts the ranks that do."""
    from megatron_paint.launch.local import default_processes, inside_a_world, run_here
    from megatron_paint.settings import load_settings

    settings = load_settings(options.config, options.overrides)
    if not inside_a_world():
        processes = default_processes(settings.megatron) if options.processes is None else options.processes
        _check_first(settings, processes, options)
        if options.dry_run:
            return 0
        if processes > 1:
            return run_here(arguments, processes)
    from megatron_paint.trainer import train

    train(settings, mode=_mode(options), self_check_only=options.self_check)
    return 0


def _check_first(settings: "Settings", processes: int, options: argparse.Namespace) -> None:
    """All that can be checked without a model: a mistake is told in seconds, by one process."""
    from megatron_paint.sources import check_sources

    plan = _plan(settings, processes)
    notes = check_sources(settings, plan.shape, run_folder=not options.self_check)
    if options.dry_run:
        print("\n".join([*plan.lines(settings), *notes]))


def _plan(settings: "Settings", processes: int) -> "Plan":
    from megatron_paint.plan import make_plan

    if processes < 1:
        raise UserError(f"--processes must be at least 1, got {processes}")
    return make_plan(settings, processes=processes)


def run_evaluate(options: argparse.Namespace, arguments: list[str]) -> int:
    """Evaluates the model of the settings file, in as many ranks as the layout needs."""
    from megatron_paint.launch.local import default_processes, inside_a_world, run_here
    from megatron_paint.settings import load_settings
    from megatron_paint.sources import load_held_out_sources

    settings = load_settings(options.config, options.overrides)
    if settings.evaluation.problems is None:
        raise UserError("evaluation.problems is not set: give the file of held-out problems")
    if not inside_a_world():
        processes = default_processes(settings.megatron) if options.processes is None else options.processes
        load_held_out_sources(settings, _plan(settings, processes).shape)
        if processes > 1:
            return run_here(arguments, processes)
    from megatron_paint.trainer import evaluate

    evaluate(settings, mode=_mode(options), out=options.out)
    return 0


def run_inspect(options: argparse.Namespace, _: list[str]) -> int:
    """Prints one sample of a run."""
    from megatron_paint.inspect import inspect_sample
    from megatron_paint.run.folder import RunFolder
    from megatron_paint.run.settings_file import read_yaml
    from megatron_paint.tokenizers import load_tokenizer

    recorded = read_yaml(RunFolder(options.run_dir).config_file)
    tokenizer = load_tokenizer(recorded["model"]["hf_path"], chat_template=recorded["prompts"]["chat_template"])

    def decode(ids: Sequence[int]) -> str:
        return tokenizer.decode(ids, keep_special=True)

    inspect_sample(options.run_dir, options.step, index=options.index, id=options.id, tokenizer_decode=decode)
    return 0


def run_doctor(options: argparse.Namespace, _: list[str]) -> int:
    """Prints what this machine has."""
    from megatron_paint.doctor import doctor

    return doctor(as_json=options.json, run_parent=os.getcwd())
