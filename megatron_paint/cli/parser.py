"""The commands and their options. The module of a command is imported when the command runs."""

import argparse
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from megatron_paint import __version__
from megatron_paint.base.argument_parser import Parser
from megatron_paint.cli.convert_options import add_commands as add_convert_commands
from megatron_paint.cli.help_examples import add_examples
from megatron_paint.cli.launch_search import add_command as add_launch_search
from megatron_paint.cli.launch_slurm import add_commands as add_launch_commands
from megatron_paint.cli.plan_options import add_plan_options
from megatron_paint.cli.search_options import add_search_options


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands. `options.run(options, arguments)` runs the chosen one and returns its exit status."""
    parser = Parser(prog="megatron-paint", description="PAINT on Megatron-Core")
    parser.add_argument("--version", action="version", version=f"megatron-paint {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_train(commands.add_parser("train", help="train from a settings file"))
    _add_search(
        commands.add_parser(
            "search", help="search settings: trials are runs, chosen and pruned by their held-out accuracy"
        )
    )
    _add_evaluate(
        commands.add_parser(
            "evaluate",
            help="Avg@n, pass@k and maj@n of a model on benchmarks (evaluate compare A B compares two models)",
            epilog="megatron-paint evaluate compare A B compares two evaluations; see megatron-paint compare --help",
        )
    )
    _add_compare(
        commands.add_parser("compare", help="compare two evaluations, paired by problem, with intervals and p-values")
    )
    inspect = commands.add_parser("inspect", help="show samples or the profile of a run")
    kinds = inspect.add_subparsers(required=True, metavar="WHAT")
    _add_samples(kinds.add_parser("samples", help="one sample of a step: what was hidden, found and selected"))
    _add_profile(kinds.add_parser("profile", help="where the time of profiled steps went: phases and operators"))
    _add_status(commands.add_parser("status", help="the state of a run, also while it runs"))
    _add_report(
        commands.add_parser("report", help="curves, evaluations, settings, warnings and samples of runs as a web page")
    )
    convert = commands.add_parser("convert", help="Qwen3 checkpoints between Hugging Face and Megatron")
    add_convert_commands(convert.add_subparsers(required=True, metavar="ACTION"))
    launch = commands.add_parser("launch", help="submit a run or a search to a cluster")
    places = launch.add_subparsers(required=True, metavar="WHERE")
    add_launch_commands(places)
    add_launch_search(places)
    _add_plan(commands.add_parser("plan", help="the fastest layouts of a model on given GPUs, by a model of time"))
    _add_settings_command(
        commands.add_parser("settings", help="every setting: its type, limits, default, meaning and source")
    )
    _add_doctor(commands.add_parser("doctor", help="what this machine has, and what is missing and its cost"))
    _add_init(commands.add_parser("init", help="print a complete settings file for a model size and an objective"))
    _add_quickstart(
        commands.add_parser("quickstart", help="train a tiny model that comes with the package on 4 CPU processes")
    )
    _add_push(commands.add_parser("push", help="upload an exported model to the Hugging Face hub; dry by default"))
    add_examples(parser)
    return parser


def _run(module: str) -> Callable[[argparse.Namespace, list[str]], int]:
    """Imports a module of cli/ when its command runs, and calls its `run`."""

    def run(options: argparse.Namespace, arguments: list[str]) -> int:
        return import_module(f"megatron_paint.cli.{module}").run(options, arguments)

    return run


def _add_train(train: argparse.ArgumentParser) -> None:
    _add_settings(train)
    train.add_argument("--dry-run", action="store_true", help="check everything, print sizes and memory, and end")
    train.add_argument(
        "--gpu-memory", metavar="SIZE", help="plan for GPUs of this memory, such as 80GB; default: this machine's"
    )
    train.add_argument(
        "--log-every", type=int, default=1, metavar="N", help="print the line of every Nth step, the first and the last"
    )
    train.add_argument("--self-check", action="store_true", help="compare the model with itself, and end")
    train.set_defaults(run=_run("train"))


def _add_search(search: argparse.ArgumentParser) -> None:
    search.add_argument("config", type=Path, metavar="SETTINGS.yaml", help="trial 0, from which the others start")
    search.add_argument("space", type=Path, metavar="SPACE.yaml", help="the settings to vary; see docs/search.md")
    search.add_argument("overrides", nargs="*", metavar="key=value", help="such as optimizer.lr=1e-5")
    add_search_options(search)
    search.add_argument("--dry-run", action="store_true", help="check everything, print space and cost, and end")
    search.add_argument("--report-only", action="store_true", help="write the report of the trials so far, and end")
    console = search.add_mutually_exclusive_group()
    console.add_argument("--quiet", action="store_true", help="print only results and warnings")
    console.add_argument("--json", action="store_true", help="print one JSON object per event")
    search.set_defaults(run=_run("search"))


def _add_evaluate(evaluate: argparse.ArgumentParser) -> None:
    _add_settings(evaluate, needed=False)
    evaluate.add_argument(
        "--model", type=Path, help="Hugging Face folder or a name on the hub, PEFT adapter, or a checkpoint of a run"
    )
    evaluate.add_argument(
        "--base", type=Path, help="Hugging Face folder that an adapter or a Megatron checkpoint belongs to"
    )
    evaluate.add_argument(
        "--benchmarks", help="names or files, with commas: aime24,aime25,hmmt25,math500,gsm8k,held_out.jsonl"
    )
    evaluate.add_argument("--n", type=int, dest="samples", help="samples per problem (evaluation.samples)")
    evaluate.add_argument(
        "--engine", choices=("megatron", "vllm"), help="what samples: this program, or vLLM servers (rollout.engine)"
    )
    evaluate.add_argument("--responses", type=Path, help="grade these recorded responses (JSONL); needs no model")
    evaluate.add_argument("--out", type=Path, help="folder of the results; default: evaluations/MODEL")
    evaluate.set_defaults(run=_run("evaluate"))


def _add_compare(compare: argparse.ArgumentParser) -> None:
    compare.add_argument("a", type=Path, metavar="A", help="folder of an evaluation, or one of its BENCHMARK.json")
    compare.add_argument("b", type=Path, metavar="B", help="the same of another model")
    compare.add_argument("--json", action="store_true", help="print JSON")
    compare.add_argument("--out", type=Path, help="also write the table to this Markdown file")
    compare.set_defaults(run=_run("compare"))


def _add_samples(samples: argparse.ArgumentParser) -> None:
    samples.add_argument("run_dir", type=Path, metavar="RUN")
    samples.add_argument("step", type=int, metavar="STEP")
    samples.add_argument("--index", type=int, default=0, help="number of the sample in the step, from 0")
    samples.add_argument("--id", help="the sample of this problem instead")
    samples.set_defaults(run=_run("inspect_samples"))


def _add_profile(profile: argparse.ArgumentParser) -> None:
    profile.add_argument("run_dir", type=Path, metavar="RUN")
    profile.add_argument("--step", type=int, help="this step alone; default: all profiled steps")
    profile.add_argument("--rank", type=int, help="operators of this rank; default: the first one that has a trace")
    profile.add_argument("--top", type=int, default=5, help="operators of each phase, at most 12; default: 5")
    profile.add_argument("--json", action="store_true", help="print JSON")
    profile.set_defaults(run=_run("inspect_profile"))


def _add_status(status: argparse.ArgumentParser) -> None:
    status.add_argument("run_dir", type=Path, metavar="RUN")
    status.add_argument("--json", action="store_true", help="print JSON")
    status.set_defaults(run=_run("status"))


def _add_plan(plan: argparse.ArgumentParser) -> None:
    add_plan_options(plan)
    plan.set_defaults(run=_run("plan"))


def _add_report(report: argparse.ArgumentParser) -> None:
    report.add_argument("runs", type=Path, metavar="RUN", nargs="+", help="run folders, also of runs that still train")
    report.add_argument(
        "--out", type=Path, metavar="FILE", help="HTML file; default: RUN/report.html, or report.html for several runs"
    )
    report.add_argument("--serve", action="store_true", help="write no file, but follow the runs on 127.0.0.1")
    report.add_argument("--port", type=int, help="port for --serve; default: any free one")
    report.set_defaults(run=_run("report"))


def _add_settings_command(settings: argparse.ArgumentParser) -> None:
    settings.add_argument(
        "key", nargs="?", metavar="KEY", help="a section such as optimizer, or a key such as run.steps"
    )
    settings.add_argument("--json", action="store_true", help="print JSON")
    settings.set_defaults(run=_run("settings"))


def _add_doctor(doctor: argparse.ArgumentParser) -> None:
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.set_defaults(run=_run("doctor"))


def _add_init(init: argparse.ArgumentParser) -> None:
    init.add_argument("size", nargs="?", metavar="SIZE", help="a model size such as qwen3_8b")
    init.add_argument("objective", nargs="?", metavar="OBJECTIVE", help="such as paint, opsd or grpo")
    init.add_argument("--list", action="store_true", help="print the sizes and the objectives of each")
    init.set_defaults(run=_run("init_settings"))


def _add_quickstart(quickstart: argparse.ArgumentParser) -> None:
    quickstart.add_argument(
        "--out",
        type=Path,
        default=Path("quickstart"),
        metavar="FOLDER",
        help="gets model, problems, settings and the run; default: quickstart",
    )
    quickstart.add_argument("--processes", type=int, default=4, metavar="N", help="ranks, a multiple of 4; default: 4")
    quickstart.add_argument("--dry-run", action="store_true", help="copy and check everything, and end")
    console = quickstart.add_mutually_exclusive_group()
    console.add_argument("--quiet", action="store_true", help="print only warnings and the final table")
    console.add_argument("--json", action="store_true", help="print one JSON object per event")
    quickstart.set_defaults(run=_run("quickstart"))


def _add_push(push: argparse.ArgumentParser) -> None:
    push.add_argument("folder", type=Path, metavar="FOLDER", help="an exported Hugging Face or PEFT folder")
    push.add_argument("repository", metavar="OWNER/NAME", help="the model on the hub")
    push.add_argument(
        "--base", metavar="OWNER/NAME", help="the base's name on the hub; a PEFT folder with a local base needs it"
    )
    push.add_argument("--yes", action="store_true", help="upload; without it, only print what would be done")
    push.add_argument("--private", action="store_true", help="make a new model private")
    push.add_argument("--message", metavar="TEXT", help="of the commit; default: the name of the folder")
    push.set_defaults(run=_run("push"))


def _add_settings(parser: argparse.ArgumentParser, *, needed: bool = True) -> None:
    """The settings file, overrides, the number of ranks, and what the console prints."""
    parser.add_argument("config", type=Path, metavar="SETTINGS.yaml", nargs=None if needed else "?")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as optimizer.lr=1e-5")
    parser.add_argument(
        "--processes",
        type=int,
        help="number of ranks to start here; default: one per GPU; without GPUs as many as one replica needs",
    )
    console = parser.add_mutually_exclusive_group()
    console.add_argument("--quiet", action="store_true", help="print only warnings and the final table")
    console.add_argument("--json", action="store_true", help="print one JSON object per event")
