"""The options that `search` and `launch search` share."""

import argparse
from pathlib import Path

from megatron_paint.base.errors import UserError

LEAST = {"trials": 1, "jobs": 1, "seed": 0, "processes": 1, "workers": 1}


def add_search_options(search: argparse.ArgumentParser) -> None:
    """Adds them to a command."""
    search.add_argument(
        "--trials", type=int, default=24, metavar="N", help="trials of the study, with those that exist; default: 24"
    )
    search.add_argument(
        "--jobs", type=int, default=1, metavar="J", help="trials side by side, which divide the GPUs here; default: 1"
    )
    search.add_argument("--seed", type=int, default=1, help="random key of the choice of settings; default: 1")
    search.add_argument("--out", type=Path, metavar="FOLDER", help="folder of the study; default: RUN.DIR_search")
    search.add_argument(
        "--processes",
        type=int,
        help="ranks of a trial; default: one per GPU of its share; without GPUs as many as one replica needs",
    )


def check_search_options(given: argparse.Namespace) -> None:
    """UserError: a number is too small."""
    for name, least in LEAST.items():
        value = getattr(given, name, None)
        if value is not None and value < least:
            raise UserError(f"--{name} must be at least {least}, got {value}")
