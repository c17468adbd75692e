"""What `train` and `evaluate` share: the ranks that they start or belong to, and what the console prints."""

import argparse
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from megatron_paint.base.counts import count_text
from megatron_paint.base.errors import UserError
from megatron_paint.config.megatron import MegatronSettings
from megatron_paint.launch.local import number_of_processes, run_here
from megatron_paint.launch.loopback import loopback
from megatron_paint.launch.print_once import host_store
from megatron_paint.launch.rank_environment import RankEnvironment, export_rank_environment, find_rank_environment

if TYPE_CHECKING:
    from megatron_paint.run.console import Mode, Progress


def console_mode(options: argparse.Namespace) -> "Mode":
    """What `--quiet` and `--json` ask for."""
    return "quiet" if options.quiet else "json" if options.json else "normal"


def rank_environment_of(options: argparse.Namespace) -> RankEnvironment | None:
    """The rank environment that torchrun or srun gave this process; None if it is not one of their ranks.

    It is also written into os.environ, where torch.distributed reads it, and rank 0 starts the store in which the ranks
    agree who prints an error. UserError: the variables contradict each other, or `--processes` contradicts them.
    """
    environment = find_rank_environment(os.environ)
    if environment is None:
        return None
    if options.processes not in (None, environment.size):
        raise UserError(
            f"--processes={options.processes} is given, but this process is one of "
            f"{count_text(environment.size, 'rank')} that torchrun or srun started: start as many ranks as you need, "
            "and leave --processes out"
        )
    export_rank_environment(environment, os.environ)
    host_store(environment)
    return environment


def number_of_ranks(
    megatron: MegatronSettings, options: argparse.Namespace, environment: RankEnvironment | None
) -> int:
    """The number of ranks that exist, or else the number that will be started here."""
    return environment.size if environment is not None else number_of_processes(megatron, options.processes)


def start_ranks_here(
    arguments: Sequence[str],
    processes: int,
    progress: "Progress",
    *,
    prepare: Callable[[str], None] = lambda folder: None,
    interrupted: Callable[[], str] = str,
    kept: Callable[[], str] = str,
) -> int:
    """Starts the ranks of a command on this machine and waits for them; returns the exit status.

    prepare, interrupted, kept: see `run_here`.
    """
    progress.note(
        f"starting {count_text(processes, 'rank')}: each imports PyTorch and Megatron-Core and loads its part of the "
        "model",
        processes=processes,
    )
    with loopback(os.environ):
        return run_here(
            arguments, processes, prepare=prepare, say=progress.on_stderr, interrupted=interrupted, kept=kept
        )
