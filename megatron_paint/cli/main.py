"""The command line, `megatron-paint COMMAND`. Exit status 2 is a mistake of the user, and its message is one line."""

import argparse
import os
import sys
import traceback
from collections.abc import Sequence

from megatron_paint.base.errors import UserError
from megatron_paint.cli.completion import complete
from megatron_paint.cli.parser import make_parser
from megatron_paint.launch.failure_notes import leave_failure_note
from megatron_paint.runtime.processes import end_with_launcher


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status. A UserError becomes one line on stderr, without a traceback."""
    if "_ARGCOMPLETE" in os.environ:
        complete(make_parser())
    end_with_launcher()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        options = parse(arguments)
        return options.run(options, arguments)
    except UserError as error:
        _print_error(f"megatron-paint: error: {error}")
        return 2
    except KeyboardInterrupt as error:  # its text is what remains of the work
        if os.environ.get("RANK", "0") == "0":
            print("; ".join(["megatron-paint: ended by SIGINT", *map(str, error.args)]), file=sys.stderr)
        return 130
    except Exception:
        if not leave_failure_note(traceback.format_exc(), mistake=False):
            raise
        return 1


def _print_error(message: str) -> None:
    """Prints an error once, no matter how many ranks have it."""
    from megatron_paint.launch.print_once import print_once
    from megatron_paint.launch.rank_environment import find_rank_environment

    if leave_failure_note(message, mistake=True):
        return
    try:
        environment = find_rank_environment(os.environ)
    except UserError:
        environment = None
    if environment is None or environment.size == 1:
        print(message, file=sys.stderr)
    else:
        print_once(message, environment)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command and its options. Overrides may follow anywhere after the settings file.

    Errors: UserError names an argument that is neither an option nor key=value.
    """
    from megatron_paint.cli.launch_slurm import join_sbatch_lines

    if list(arguments[:2]) == ["evaluate", "compare"]:
        arguments = arguments[1:]
    arguments = join_sbatch_lines(arguments)
    options, left = make_parser().parse_known_args(arguments)
    _move_override_out_of_config(options)
    takes_overrides = hasattr(options, "overrides")
    for argument in left:
        if argument.startswith("-") or not takes_overrides:
            near = options.parser.nearest_option(argument) if argument.startswith("-") else ""
            raise UserError(
                f"unknown argument {argument!r}{f': {near}' if near else ''} (see {options.parser.prog} --help)"
            )
    if takes_overrides:
        options.overrides += left
    return options


def _move_override_out_of_config(options: argparse.Namespace) -> None:
    """Where the settings file is optional and missing, argparse takes the first key=value for it."""
    config = getattr(options, "config", None)
    if config is not None and "=" in str(config) and not config.exists():
        options.overrides = [str(config), *options.overrides]
        options.config = None
