"""Finds out which node this is, how many nodes there are, and their names."""

import os
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_paint.base.counts import count_text
from megatron_paint.base.errors import UserError

SCONTROL_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class Node:
    """This node in the job. Rank 0 is the first node, to which the others report."""

    rank: int
    name: str
    names: tuple[str, ...]  # expected names of all nodes, by rank

    @property
    def count(self) -> int:
        return len(self.names)

    @property
    def first(self) -> str:
        """Name of the first node."""
        return self.names[0]


def find_node(
    environ: Mapping[str, str], *, rank: int | None, count: int | None, name: str | None, names: str | None
) -> Node:
    """This node: from the arguments, else from Slurm's variables, else a single machine.

    names: separated by commas. Errors: UserError if the values contradict each other.
    """
    if rank is None and environ.get("SLURM_LOCALID", "0") != "0":
        raise UserError(
            f"SLURM_LOCALID={environ['SLURM_LOCALID']}: the preflight runs once on each node; start it with "
            "srun --ntasks-per-node=1"
        )
    given = [part.strip() for part in (names or "").split(",") if part.strip()]
    rank = _whole(environ, "SLURM_NODEID", 0) if rank is None else rank
    count = _whole(environ, "SLURM_NNODES", len(given) or 1) if count is None else count
    if not 0 <= rank < count:
        raise UserError(f"--node-rank {rank} must be from 0 and below the number of nodes, {count} (--nodes)")
    if given and len(given) != count:
        raise UserError(
            f"--node-names has {len(given)} names for {count_text(count, 'node')}: give one name for each node, in "
            "their order"
        )
    name = name or environ.get("SLURMD_NODENAME") or (given[rank] if given else socket.gethostname())
    expected = given or _slurm_names(environ, count) or [f"node {number}" for number in range(count)]
    expected[rank] = name
    return Node(rank=rank, name=name, names=tuple(expected))


def _slurm_names(environ: Mapping[str, str], count: int) -> list[str]:
    """Slurm's names of the nodes of this step; empty if scontrol does not answer."""
    short = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    if not short:
        return []
    command = ["scontrol", "show", "hostnames", short]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=SCONTROL_SECONDS, env=dict(os.environ))
    except (OSError, subprocess.TimeoutExpired):
        return []
    names = answer.stdout.split()
    return names if answer.returncode == 0 and len(names) == count else []


def _whole(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit()):
        raise UserError(
            f"{name}={text!r} must be a whole number, 0 or more, as srun sets it; start with srun, or unset it"
        )
    return int(text)
