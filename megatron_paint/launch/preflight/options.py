"""The command line of the preflight."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_paint.base.argument_parser import Parser
from megatron_paint.base.errors import UserError
from megatron_paint.launch.preflight.port import Rendezvous, parse_rendezvous

LIMIT_SECONDS = 60.0
LEAST_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of the command line, checked. None: the option was not given."""

    run: Path
    rendezvous: Rendezvous
    settings: Path
    overrides: tuple[str, ...]
    expect_gpus: int | None
    bandwidth_floor: float | None  # GB/s of 10^9 bytes
    exclude_bad: Path | None
    report: Path | None
    limit_seconds: float  # of all phases together
    node_rank: int | None
    nodes: int | None
    node_name: str | None
    node_names: str | None


def parse(arguments: Sequence[str]) -> Options:
    """The options of these words. UserError: an option is unknown, missing or outside its limits."""
    given = vars(_parser().parse_intermixed_args(list(arguments)))
    del given["parser"]
    for override in given["overrides"]:
        if "=" not in override:
            raise UserError(f"unknown argument {override!r}: change settings with key=value")
    if not LEAST_SECONDS <= given["limit_seconds"] < float("inf"):
        raise UserError(f"--limit-seconds {given['limit_seconds']:g} must be at least {LEAST_SECONDS:g}")
    if given["expect_gpus"] is not None and given["expect_gpus"] < 0:
        raise UserError(f"--expect-gpus {given['expect_gpus']} must be 0 or more: it is the number of GPUs of one node")
    floor = given["bandwidth_floor"]
    if floor is not None and not 0 < floor < float("inf"):
        raise UserError(f"--bandwidth-floor {floor:g} must be above 0, in GB/s; leave it out for no floor")
    rendezvous = parse_rendezvous(given.pop("rendezvous"))
    return Options(**{**given, "overrides": tuple(given["overrides"]), "rendezvous": rendezvous})


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m megatron_paint.launch.preflight",
        description="Checks every node before training. Start one process per node (srun --ntasks-per-node=1).",
        epilog="exit status: 0 every check passed; 2 a mistake on the command line; 3 a check failed",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="changed settings, as for megatron-paint train"
    )
    parser.add_argument("--run", type=Path, required=True, metavar="RUN_DIR", help="run folder on the shared disk")
    parser.add_argument(
        "--rendezvous",
        required=True,
        metavar="HOST:PORT",
        help="host of the first node, and the port that training will use",
    )
    parser.add_argument("--settings", type=Path, required=True, metavar="SETTINGS.yaml")
    parser.add_argument(
        "--expect-gpus", type=int, metavar="N", help="GPUs per node; default: the same number on every node"
    )
    parser.add_argument(
        "--bandwidth-floor",
        type=float,
        metavar="GB/s",
        help="lowest accepted bandwidth of the all-reduce over all nodes",
    )
    parser.add_argument(
        "--exclude-bad", type=Path, metavar="FILE", help="write the names of bad nodes to this file, one per line"
    )
    parser.add_argument("--report", type=Path, metavar="FILE", help="write all results to this file, as JSON")
    parser.add_argument("--limit-seconds", type=float, default=LIMIT_SECONDS, metavar="S", help="default: %(default)g")
    parser.add_argument("--node-rank", type=int, metavar="I", help="default: SLURM_NODEID, else 0")
    parser.add_argument("--nodes", type=int, metavar="N", help="default: SLURM_NNODES, else 1")
    parser.add_argument("--node-name", metavar="NAME", help="default: SLURMD_NODENAME, else the host's name")
    parser.add_argument(
        "--node-names", metavar="A,B,...", help="names of all nodes; default: from Slurm's list of nodes"
    )
    return parser
