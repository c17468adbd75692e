"""`megatron-paint launch search`: workers of one search as Slurm jobs."""

import argparse
from pathlib import Path
from typing import Any

from megatron_paint.cli.launch_slurm import add_environment_options, add_node_options
from megatron_paint.cli.search_options import add_search_options, check_search_options


def add_command(commands: Any) -> None:
    """Adds `search` to the subparsers of `launch`."""
    search = commands.add_parser("search", help="write a batch script for each worker of a search and submit it")
    search.add_argument("config", type=Path, metavar="SETTINGS.yaml")
    search.add_argument("space", type=Path, metavar="SPACE.yaml")
    search.add_argument("overrides", nargs="*", metavar="key=value", help="changed settings, such as optimizer.lr=1e-5")
    add_search_options(search)
    search.add_argument(
        "--workers", type=int, default=1, metavar="W", help="jobs at the same time, each on one node; default: 1"
    )
    search.add_argument(
        "--attempts", type=int, default=1, metavar="K", help="jobs of each worker, one after another; default: 1"
    )
    search.add_argument("--dry-run", action="store_true", help="print the scripts and the commands; change nothing")
    search.add_argument(
        "--no-check",
        dest="check",
        action="store_false",
        help="do not read data, tokenizer and weights; for login nodes that do not see them",
    )
    add_node_options(search)
    add_environment_options(search)
    # What make_options asks for, and what jobs of a search do not have.
    search.set_defaults(
        nodes=1,
        launcher="torchrun",
        max_restarts=None,
        preflight=False,
        template=None,
        copy=True,
        copy_code=False,
        tensor_parallel_across_nodes=False,
        gpu_memory=None,
        run=_run,
    )


def _run(options: argparse.Namespace, _: list[str]) -> int:
    from megatron_paint.search.slurm import launch

    check_search_options(options)
    return launch(options)
