"""The rank environment that torchrun or srun gave this process, read only from environment variables."""

import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from megatron_paint.base.errors import UserError

PORTS = range(15000, 32000)  # below the ports that Linux uses for outgoing connections
STEPS_PER_JOB = 10  # steps of one job that run at the same time get different ports


@dataclass(frozen=True, kw_only=True)
class RankEnvironment:
    """One of several ranks, and the address of rank 0."""

    rank: int
    size: int
    local_rank: int  # the GPU of its machine
    address: str
    port: int


def find_rank_environment(environ: Mapping[str, str]) -> RankEnvironment | None:
    """Reads torchrun's variables, else srun's; None if this process is not one of several ranks.

    A batch script, a shell of salloc and `srun --pty bash` have at most one task, so the result is None. Errors:
    UserError for a variable that is missing or contradicts another one.
    """
    if "RANK" in environ:
        return _torchrun_environment(environ)
    if _step_tasks(environ) > 1:
        return _srun_environment(environ)
    if "WORLD_SIZE" in environ:
        raise UserError(
            f"WORLD_SIZE={environ['WORLD_SIZE']} is set, but RANK is not: start every rank with torchrun or srun, or "
            "unset WORLD_SIZE"
        )
    return None


def export_rank_environment(environment: RankEnvironment, environ: MutableMapping[str, str]) -> None:
    """Sets the variables that torch.distributed reads, except those that are set already."""
    values = {"RANK": environment.rank, "WORLD_SIZE": environment.size, "LOCAL_RANK": environment.local_rank}
    for name, value in {**values, "MASTER_ADDR": environment.address, "MASTER_PORT": environment.port}.items():
        if not environ.get(name):
            environ[name] = str(value)


def _torchrun_environment(environ: Mapping[str, str]) -> RankEnvironment:
    size = _number(environ, "WORLD_SIZE", least=1)
    rank = _number(environ, "RANK", below=("WORLD_SIZE", size))
    if size == 1:
        return RankEnvironment(rank=rank, size=size, local_rank=0, address="127.0.0.1", port=0)
    # A batch script that sets RANK from srun's variables often does not set LOCAL_RANK.
    local = "SLURM_LOCALID" if "LOCAL_RANK" not in environ and "SLURM_LOCALID" in environ else "LOCAL_RANK"
    address = environ.get("MASTER_ADDR", "")
    if not address:
        raise UserError(f"MASTER_ADDR is not set, but WORLD_SIZE={size}: set it to the host of rank 0 on every rank")
    return RankEnvironment(
        rank=rank,
        size=size,
        local_rank=_number(environ, local, below=("WORLD_SIZE", size)),
        address=address,
        port=_number(environ, "MASTER_PORT", below=("the number of ports", 1 << 16)),
    )


def _step_tasks(environ: Mapping[str, str]) -> int:
    """Number of tasks of the srun that started this process; 0 outside srun."""
    if "SLURM_STEP_ID" not in environ:
        return 0
    return _number(environ, "SLURM_STEP_NUM_TASKS", least=1)


def _srun_environment(environ: Mapping[str, str]) -> RankEnvironment:
    size = _step_tasks(environ)
    if "SLURM_PTY_PORT" in environ:
        raise UserError(
            f"`srun --pty` started SLURM_STEP_NUM_TASKS={size} tasks, of which only the first has the terminal: start "
            "a shell with one task (srun --ntasks=1 --pty), and ranks without --pty"
        )
    if environ.get("WORLD_SIZE", str(size)) != str(size):
        raise UserError(
            f"WORLD_SIZE={environ['WORLD_SIZE']} is set, but srun started SLURM_STEP_NUM_TASKS={size} tasks: start "
            "one task per rank, or unset WORLD_SIZE"
        )
    return RankEnvironment(
        rank=_number(environ, "SLURM_PROCID", below=("SLURM_STEP_NUM_TASKS", size)),
        size=size,
        local_rank=_number(environ, "SLURM_LOCALID", below=("SLURM_STEP_NUM_TASKS", size)),
        address=environ.get("MASTER_ADDR") or first_host(environ.get("SLURM_STEP_NODELIST", "")),
        port=_step_port(environ),
    )


def _step_port(environ: Mapping[str, str]) -> int:
    """MASTER_PORT, or else a port that all tasks of the step compute in the same way."""
    if environ.get("MASTER_PORT"):
        return _number(environ, "MASTER_PORT", below=("the number of ports", 1 << 16))
    key = STEPS_PER_JOB * _number(environ, "SLURM_JOB_ID") + _number(environ, "SLURM_STEP_ID")
    return PORTS[key % len(PORTS)]


def first_host(nodes: str) -> str:
    """The first host of a list in Slurm's short form: node01 for node[01-03,7],x."""
    first = re.match(r"(?:[^,\[\]\s]|\[[^\[\]\s]+\])+", nodes)
    if first is None:
        raise UserError(
            f"SLURM_STEP_NODELIST={nodes!r} names no host: set MASTER_ADDR to the host of rank 0, or start with srun"
        )
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0])


def _number(environ: Mapping[str, str], name: str, *, least: int = 0, below: tuple[str, int] | None = None) -> int:
    """The integer in a variable, checked against its limits."""
    text = environ.get(name)
    if text is None:
        raise UserError(f"{name} is not set: start the ranks with torchrun or srun, which set it for every rank")
    if not text.isascii() or not text.isdigit() or int(text) < least:
        raise UserError(f"{name}={text!r} must be an integer, {least} or more: start the ranks with torchrun or srun")
    if below is not None and int(text) >= below[1]:
        raise UserError(f"{name}={text} must be below {below[0]}={below[1]}: start the ranks with torchrun or srun")
    return int(text)
