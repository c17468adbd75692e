"""What `train` and `evaluate` share: the ranks that they start or belong to, and what the console prints."""

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_paint.base.errors import UserError
from megatron_paint.config.settings import MegatronSettings
from megatron_paint.launch.local import number_of_processes, run_here
from megatron_paint.launch.loopback import loopback
from megatron_paint.launch.print_once import host_store
from megatron_paint.launch.rank_environment import Place, enter_place, find_place

if TYPE_CHECKING:
    from megatron_paint.run.console import Mode


def console_mode(options: argparse.Namespace) -> "Mode":
    """What `--quiet` and `--json` ask for."""
    return "quiet" if options.quiet else "json" if options.json else "normal"


def place_among_ranks(options: argparse.Namespace) -> Place | None:
    """The place of this process among ranks that torchrun or srun started; None if there are no ranks yet."""
    place = find_place(os.environ)
    if place is None:
        return None
    if options.processes not in (None, place.size):
        raise UserError(
            f"--processes={options.processes} is given, but this process is one of {place.size} ranks that torchrun or "
            "srun started: start as many ranks as you need, and leave --processes out"
        )
    enter_place(place, os.environ)
    host_store(place)
    return place


def number_of_ranks(megatron: MegatronSettings, options: argparse.Namespace, place: Place | None) -> int:
    """The number of ranks that exist, or else the number that will be started here."""
    return place.size if place is not None else number_of_processes(megatron, options.processes)


def start_ranks_here(arguments: Sequence[str], processes: int, options: argparse.Namespace) -> int:
    """Starts the ranks of a command on this machine and waits for them; returns the exit status."""
    from megatron_paint.run.console import Progress

    Progress(console_mode(options), steps=0).note(
        f"starting {processes} ranks: each imports PyTorch and Megatron-Core and loads its part of the model",
        processes=processes,
    )
    with loopback(os.environ):
        return run_here(arguments, processes)
