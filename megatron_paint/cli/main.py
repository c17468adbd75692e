"""The command line, `megatron-paint COMMAND`; exit status 2 is a mistake of the user's, told in one line."""

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_paint import __version__
from megatron_paint.base.argument_parser import Parser
from megatron_paint.base.errors import UserError
from megatron_paint.launch.failure_notes import leave_note
from megatron_paint.runtime.processes import end_with_launcher

if TYPE_CHECKING:
    from megatron_paint.config.settings import Settings
    from megatron_paint.launch.rank_environment import Place


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; its exit status. A UserError becomes one line on stderr, without a traceback."""
    end_with_launcher()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        options = parse(arguments)
        return options.run(options, arguments)
    except UserError as error:
        _tell(f"megatron-paint: error: {error}")
        return 2
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("megatron-paint: ended by SIGINT", file=sys.stderr)
        return 130
    except Exception:
        if not leave_note(traceback.format_exc(), mistake=False):
            raise
        return 1


def _tell(message: str) -> None:
    """Prints an error once, however many ranks meet it."""
    from megatron_paint.launch.print_once import print_once
    from megatron_paint.launch.rank_environment import find_place

    if leave_note(message, mistake=True):
        return
    try:
        place = find_place(os.environ)
    except UserError:
        place = None
    if place is None or place.size == 1:
        print(message, file=sys.stderr)
    else:
        print_once(message, place)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command and its options; overrides may stand anywhere after the settings file.

    Errors: UserError that names what is neither an option nor key=value.
    """
    from megatron_paint.cli.launch_slurm import join_sbatch_lines

    if list(arguments[:2]) == ["evaluate", "compare"]:
        arguments = arguments[1:]
    arguments = join_sbatch_lines(arguments)
    options, left = make_parser().parse_known_args(arguments)
    _settings_or_override(options)
    takes_overrides = hasattr(options, "overrides")
    for argument in left:
        if argument.startswith("-") or not takes_overrides:
            raise UserError(f"unknown argument {argument!r} (see megatron-paint --help)")
    if takes_overrides:
        options.overrides += left
    return options


def _settings_or_override(options: argparse.Namespace) -> None:
    """Where the settings file may be left out, the first key=value would be taken for it."""
    config = getattr(options, "config", None)
    if config is not None and "=" in str(config) and not config.exists():
        options.overrides = [str(config), *options.overrides]
        options.config = None


def make_parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    from megatron_paint.cli.convert_options import add_commands
    from megatron_paint.cli.launch_slurm import add_commands as add_launch_commands

    parser = Parser(prog="megatron-paint", description="PAINT on Megatron-Core")
    parser.add_argument("--version", action="version", version=f"megatron-paint {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train from a settings file")
    _add_settings(train)
    train.add_argument("--dry-run", action="store_true", help="check everything, print sizes and memory, and end")
    train.add_argument("--self-check", action="store_true", help="score the model against itself, and end")
    train.set_defaults(run=run_train)

    evaluate = commands.add_parser(
        "evaluate",
        help="Avg@n, pass@k and maj@n of a model on benchmarks (evaluate compare A B: two of them, paired)",
        epilog="megatron-paint evaluate compare A B compares two evaluations; see megatron-paint compare --help",
    )
    _add_settings(evaluate, needed=False)
    evaluate.add_argument("--model", type=Path, help="Hugging Face folder, or a checkpoint of a run")
    evaluate.add_argument(
        "--benchmarks", help="names or files, with commas: aime24,aime25,hmmt25,math500,gsm8k,held_out.jsonl"
    )
    evaluate.add_argument("--n", type=int, dest="samples", help="samples a problem (evaluation.samples)")
    evaluate.add_argument("--responses", type=Path, help="grade these recorded responses (JSONL); needs no model")
    evaluate.add_argument("--out", type=Path, help="folder of the results; default: evaluations/MODEL")
    evaluate.set_defaults(run=run_evaluate)

    compare = commands.add_parser("compare", help="two evaluations, paired by problem, with intervals and p-values")
    compare.add_argument("a", type=Path, metavar="A", help="folder of an evaluation, or one of its BENCHMARK.json")
    compare.add_argument("b", type=Path, metavar="B", help="the same of another model")
    compare.add_argument("--json", action="store_true", help="print JSON")
    compare.add_argument("--out", type=Path, help="write the table to this Markdown file too")
    compare.set_defaults(run=run_compare)

    inspect = commands.add_parser("inspect", help="look into a run folder")
    things = inspect.add_subparsers(required=True, metavar="WHAT")
    samples = things.add_parser("samples", help="one sample of a step: what was hidden, found and selected")
    samples.add_argument("run_dir", type=Path, metavar="RUN")
    samples.add_argument("step", type=int, metavar="STEP")
    samples.add_argument("--index", type=int, default=0, help="which sample of the step, from 0")
    samples.add_argument("--id", help="the sample of this problem instead")
    samples.set_defaults(run=run_inspect)

    status = commands.add_parser("status", help="where a run stands, also while it runs")
    status.add_argument("run_dir", type=Path, metavar="RUN")
    status.add_argument("--json", action="store_true", help="print JSON")
    status.set_defaults(run=run_status)

    convert = commands.add_parser("convert", help="Qwen3 checkpoints between Hugging Face and Megatron")
    add_commands(convert.add_subparsers(required=True, metavar="ACTION"))

    launch = commands.add_parser("launch", help="submit a run to a cluster")
    add_launch_commands(launch.add_subparsers(required=True, metavar="WHERE"))

    settings = commands.add_parser("settings", help="every setting: its type, limits, default, meaning and source")
    settings.add_argument(
        "key", nargs="?", metavar="KEY", help="a section such as optimizer, or a key such as run.steps"
    )
    settings.add_argument("--json", action="store_true", help="print JSON")
    settings.set_defaults(run=run_settings)

    doctor = commands.add_parser("doctor", help="what was found on this machine, and what lacking it costs")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.set_defaults(run=run_doctor)
    return parser


def _add_settings(parser: argparse.ArgumentParser, *, needed: bool = True) -> None:
    parser.add_argument("config", type=Path, metavar="SETTINGS.yaml", nargs=None if needed else "?")
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
    """Checks the settings before Megatron is imported; then trains here, or starts the ranks that do."""
    from megatron_paint.config.load import load_settings
    from megatron_paint.planning.memory import make_plan

    place = _place(options)
    settings = load_settings(options.config, options.overrides)
    processes = _processes(settings, options, place)
    plan = make_plan(settings, processes=processes)
    if place is None or (options.dry_run and place.rank == 0):
        from megatron_paint.training.inputs import check_sources

        notes = check_sources(
            settings, plan.shape, run_folder=not options.self_check
        )  # a mistake is told in seconds, by one process
        if options.dry_run:
            print("\n".join([*plan.lines(settings), *notes]))
    if options.dry_run:
        return 0
    if place is None and processes > 1:
        from megatron_paint.launch.local import run_here

        return run_here(arguments, processes)
    from megatron_paint.runtime.stop import exit_status
    from megatron_paint.training.start import train

    finished = train(settings, mode=_mode(options), self_check_only=options.self_check)
    return 0 if finished else exit_status()


def _place(options: argparse.Namespace) -> "Place | None":
    """This process's place in the world that torchrun or srun made; None where the ranks are still to be started."""
    from megatron_paint.launch.print_once import host_store
    from megatron_paint.launch.rank_environment import enter_place, find_place

    place = find_place(os.environ)
    if place is None:
        return None
    if options.processes not in (None, place.size):
        raise UserError(
            f"--processes={options.processes} is given, but this process is one of {place.size} ranks that torchrun or "
            "srun started: start as many as there are to be, and leave --processes out"
        )
    enter_place(place, os.environ)
    host_store(place)
    return place


def _processes(settings: "Settings", options: argparse.Namespace, place: "Place | None") -> int:
    from megatron_paint.launch.local import number_of_processes

    return place.size if place is not None else number_of_processes(settings.megatron, options.processes)


def run_evaluate(options: argparse.Namespace, arguments: list[str]) -> int:
    """Evaluates a model, in as many ranks as the layout needs, or grades responses that are there."""
    from megatron_paint.cli.evaluate_options import requested
    from megatron_paint.launch.local import run_here
    from megatron_paint.planning.memory import make_plan

    if options.responses is not None:
        return _grade_responses(options)
    place = _place(options)
    asked = requested(
        config=options.config,
        model=options.model,
        benchmarks=options.benchmarks,
        samples=options.samples,
        out=options.out,
        overrides=options.overrides,
    )
    processes = _processes(asked.settings, options, place)
    plan = make_plan(asked.settings, processes=processes)
    if place is None:
        from megatron_paint.cli.evaluate import answer_file, load_evaluators

        for name, evaluator in load_evaluators(asked, plan.shape):  # a mistake is told in seconds, by one process
            answer_file(asked, name, evaluator).begin()
        if processes > 1:
            return run_here(arguments, processes)
    from megatron_paint.cli.evaluate import evaluate

    evaluate(asked, mode=_mode(options))
    return 0


def _grade_responses(options: argparse.Namespace) -> int:
    from megatron_paint.cli.grade_responses import grade_recorded

    for name, value in (("--model", options.model), ("--n", options.samples), ("SETTINGS.yaml", options.config)):
        if value is not None:
            raise UserError(
                f"{name} samples answers, and --responses gives those that are there: leave one of them out"
            )
    if options.benchmarks is None:
        raise UserError("--responses needs --benchmarks: the problems with the right answers")
    grade_recorded(options.responses, options.benchmarks, options.out, overrides=options.overrides, mode=_mode(options))
    return 0


def run_compare(options: argparse.Namespace, _: list[str]) -> int:
    """Prints a comparison of two evaluations."""
    from dataclasses import asdict

    from rich.console import Console

    from megatron_paint.base.json_text import to_json
    from megatron_paint.evaluation import compare
    from megatron_paint.runtime.files import write_atomically

    rows = compare.compare_files(options.a, options.b)
    if odd := compare.sampled_otherwise(options.a, options.b):
        print(f"megatron-paint: warning: the two were sampled otherwise: {'; '.join(odd)}", file=sys.stderr)
    if options.out is not None:
        write_atomically(options.out, compare.markdown(rows, a=options.a, b=options.b))
    if options.json:
        print(to_json([asdict(row) for row in rows], indent=1))
        return 0
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120
    console.print(compare.console_table(rows))
    return 0


def run_inspect(options: argparse.Namespace, _: list[str]) -> int:
    """Prints one sample of a run."""
    from megatron_paint.cli.inspect_samples import inspect_sample
    from megatron_paint.config.load import settings_of
    from megatron_paint.config.saved import read_config
    from megatron_paint.data.tokenizers import load_tokenizer
    from megatron_paint.run.folder import RunFolder

    settings = settings_of(read_config(RunFolder(options.run_dir).config_file))
    tokenizer = load_tokenizer(settings.model.hf_path, chat_template=settings.prompts.chat_template)

    def decode(ids: Sequence[int]) -> str:
        return tokenizer.decode(ids, keep_special=True)

    inspect_sample(options.run_dir, options.step, index=options.index, id=options.id, tokenizer_decode=decode)
    return 0


def run_status(options: argparse.Namespace, _: list[str]) -> int:
    """Prints where a run stands."""
    from dataclasses import asdict

    from megatron_paint.base.json_text import to_json
    from megatron_paint.run.status import read_status, status_lines

    status = read_status(options.run_dir)
    print(to_json(asdict(status)) if options.json else "\n".join(status_lines(status)))
    return 0


def run_settings(options: argparse.Namespace, _: list[str]) -> int:
    """Prints what is known of the settings."""
    from megatron_paint.cli.settings import print_settings

    print_settings(options.key, as_json=options.json)
    return 0


def run_doctor(options: argparse.Namespace, _: list[str]) -> int:
    """Prints what this machine has."""
    from megatron_paint.cli.doctor import doctor

    return doctor(as_json=options.json, run_parent=os.getcwd())
