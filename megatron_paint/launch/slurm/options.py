"""What the user asked of Slurm, checked: a value that stands in the script can neither break nor extend it."""

import argparse
import re
import stat
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megatron_paint.base.errors import UserError

if TYPE_CHECKING:
    from megatron_paint.config.settings import RunSettings

# Slurm's own options with a value that goes into the script as it is: what the value looks like, and what it means.
PLACING = {
    "time": ("D-HH:MM:SS", "time limit of one job; default: the partition's"),
    "account": ("NAME", "account that pays"),
    "partition": ("NAME", "partition"),
    "qos": ("NAME", "quality of service"),
    "constraint": ("FEATURES", "features that a node must have"),
    "reservation": ("NAME", "reservation"),
    "exclude": ("NODES", "nodes to stay off"),
}
MOST_SIGNAL_SECONDS = 65535  # Slurm's own limit
RESTARTS = 3  # a death is seen by several agents, and each of them starts a round: two nodes may use up two
CONTROL = re.compile(r"[\x00-\x1f\x7f]")
DEPENDENCY = re.compile(r"(?:--dependency[= ]|-d ?)([^\s?]+)")  # a whole line; where ? joins several, one will do
TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<a>\d+)(?::(?P<b>\d+))?(?::(?P<c>\d+))?")
# What each value may hold; Slurm reads #SBATCH lines itself, so that blanks, quotes and `#` would end a value.
NAME = re.compile(r"[\w.+-]+")
PATTERNS: dict[str, tuple[re.Pattern, str]] = {
    "account": (NAME, "a name of letters, digits and . _ + -"),
    "partition": (re.compile(r"[\w.+,-]+"), "names of letters, digits and . _ + -, with commas between"),
    "qos": (NAME, "a name of letters, digits and . _ + -"),
    "constraint": (re.compile(r"[\w.+,&|*()\[\]!=@-]+"), "feature names, joined by & | , * ( ) [ ]"),
    "reservation": (re.compile(r"[\w.+,-]+"), "names of letters, digits and . _ + -, with commas between"),
    "exclude": (re.compile(r"[\w.,\[\]-]+"), "node names such as node[01-03],node07"),
    "job-name": (NAME, "a name of letters, digits and . _ + -"),
    "mem": (re.compile(r"\d+[KMGT]?"), "a number with K, M, G or T, or 0 for all of a node's"),
    "module": (re.compile(r"[\w.+][\w.+/:=-]*"), "a module's name such as cuda/12.8"),
}


@dataclass(frozen=True, kw_only=True)
class SlurmOptions:
    """Where and how the jobs of a run are to run; None: Slurm's own default."""

    nodes: int
    gpus_per_node: int  # 0: nodes without GPUs
    processes_per_node: int
    launcher: Literal["torchrun", "srun"]
    max_restarts: int  # of torchrun, within one job
    placing: Mapping[str, str]  # time, account, partition, ... that were given
    job_name: str
    cpus_per_task: int | None  # None: all of a node's
    mem: str
    exclusive: bool
    signal_seconds: int
    sbatch: tuple[str, ...]  # further #SBATCH lines
    python: str  # on the nodes
    modules: tuple[str, ...]
    container: str | None
    container_runtime: Literal["pyxis", "apptainer"]
    container_python: str
    mounts: tuple[str, ...]
    env: tuple[str, ...]  # names of variables
    env_file: str | None
    links: int
    preflight: bool

    @property
    def processes(self) -> int:
        """Ranks of a job."""
        return self.nodes * self.processes_per_node

    @property
    def tasks_per_node(self) -> int:
        """Slurm tasks on a node, of which torchrun is one."""
        return 1 if self.launcher == "torchrun" else self.processes_per_node


def make_options(given: argparse.Namespace, *, run: "RunSettings", environ: Mapping[str, str]) -> SlurmOptions:
    """Checks the command line's options; UserError names the option, what it got and what holds."""
    _check_numbers(given)
    _check_combinations(given)
    placing = {name: value for name in PLACING if (value := getattr(given, name)) is not None}
    for name in placing.keys() - {"time"}:
        _check_text(name, placing[name])
    if given.time is not None:
        _check_time(given.time, given.signal_seconds, run.exit_before_limit_s)
    _check_text("mem", given.mem)
    for module in given.module:
        _check_text("module", module)
    for name in given.env:
        _check_variable(name, environ)
    for option in ("python", "venv", "container", "container_python", "env_file"):
        _check_line(f"--{option.replace('_', '-')}", getattr(given, option))
    for mount in given.mount:
        _check_mount(mount)
    job_name = given.job_name or re.sub(r"[^\w.+-]", "_", Path(run.dir).absolute().name)
    _check_text("job-name", job_name)
    return SlurmOptions(
        nodes=given.nodes,
        gpus_per_node=given.gpus_per_node,
        processes_per_node=_processes_per_node(given),
        launcher=given.launcher,
        max_restarts=RESTARTS if given.max_restarts is None else given.max_restarts,
        placing=placing,
        job_name=job_name,
        cpus_per_task=given.cpus_per_task,
        mem=given.mem,
        # A step without --cpus-per-task takes all of a job's CPUs, which are then all of its nodes'.
        exclusive=given.exclusive or given.cpus_per_task is None,
        signal_seconds=given.signal_seconds,
        sbatch=tuple(_sbatch_line(line) for line in given.sbatch),
        python=given.python or (f"{given.venv.rstrip('/')}/bin/python" if given.venv else sys.executable),
        modules=tuple(given.module),
        container=given.container,
        container_runtime=given.container_runtime or "pyxis",
        container_python=given.container_python or "python3",
        mounts=tuple(given.mount),
        env=tuple(dict.fromkeys(given.env)),
        env_file=_env_file(given.env_file),
        links=given.links,
        preflight=given.preflight,
    )


def _check_numbers(given: argparse.Namespace) -> None:
    limits: dict[str, tuple[int, int | None]] = {
        "nodes": (1, None),
        "gpus_per_node": (0, None),
        "processes_per_node": (1, None),
        "max_restarts": (0, None),
        "cpus_per_task": (1, None),
        "links": (1, None),
        "signal_seconds": (1, MOST_SIGNAL_SECONDS),
    }
    for name, (least, most) in limits.items():
        value = getattr(given, name)
        if value is not None and (value < least or (most is not None and value > most)):
            limit = f"at least {least}" if most is None else f"in {least} to {most}"
            raise UserError(f"--{name.replace('_', '-')} must be {limit}, got {value}")


def _check_combinations(given: argparse.Namespace) -> None:
    """Options that need, or exclude, another one."""
    of_container = ("container_runtime", "container_python", "mount")
    alone = [f"--{name.replace('_', '-')}" for name in of_container if getattr(given, name)]
    for wrong, message in (
        (given.python and given.venv, "--python and --venv both name the job's Python: leave one of them out"),
        (
            given.launcher == "srun" and given.max_restarts,
            f"--max-restarts={given.max_restarts} is torchrun's, and --launcher=srun starts each rank once: leave it "
            "out, or take --launcher=torchrun",
        ),
        (
            alone and not given.container,
            f"{', '.join(alone)} belongs to a container: give --container IMAGE, or leave it out",
        ),
    ):
        if wrong:
            raise UserError(message)


def _processes_per_node(given: argparse.Namespace) -> int:
    gpus, processes = given.gpus_per_node, given.processes_per_node
    if processes is None:
        if gpus == 0:
            raise UserError(
                "--gpus-per-node=0 means nodes without GPUs, of which the number of ranks does not follow: give "
                "--processes-per-node"
            )
        return gpus
    if gpus and processes > gpus:
        raise UserError(
            f"--processes-per-node={processes} is above --gpus-per-node={gpus}, and each process drives one GPU: give "
            f"at most {gpus}"
        )
    return processes


def _check_text(option: str, value: str) -> None:
    pattern, what = PATTERNS[option]
    if not pattern.fullmatch(value):
        raise UserError(f"--{option}={value!r} must be {what}")


def _check_line(what: str, value: str | None) -> None:
    """For values that are quoted in the script: everything but control characters can be."""
    if value is not None and (not value or CONTROL.search(value)):
        raise UserError(f"{what}={value!r} must be one line of text without control characters")


def _check_time(text: str, signal_seconds: int, exit_seconds: float) -> None:
    """Slurm's ways to write a time limit: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S."""
    match = TIME.fullmatch(text)
    if match is None:
        raise UserError(f"--time={text!r} must be minutes, HH:MM:SS or D-HH:MM:SS, such as 12:00:00")
    a, b, c = (int(match[part] or 0) for part in "abc")
    if match["days"] is not None:
        seconds = int(match["days"]) * 86400 + a * 3600 + b * 60 + c
    elif match["c"] is not None:
        seconds = a * 3600 + b * 60 + c
    else:
        seconds = a * 60 + b
    if seconds <= signal_seconds:
        raise UserError(
            f"--time={text} is {seconds} s, and --signal-seconds={signal_seconds} asks for a checkpoint so long before "
            "its end: give more time, or fewer seconds"
        )
    if seconds <= exit_seconds:
        raise UserError(
            f"--time={text} is {seconds} s, and a run stops run.exit_before_limit_s={exit_seconds:g} s before its end, "
            "before its first step: give more time, or set fewer seconds"
        )


def _check_variable(name: str, environ: Mapping[str, str]) -> None:
    """A name alone; what follows a `=` may be a secret and is not repeated."""
    name, equals, _ = name.partition("=")
    if equals:
        raise UserError(
            f"--env {name}=... gives a value, which everybody could read in the script and in the list of processes: "
            f"give --env {name}, and set {name} in the shell that you launch from"
        )
    if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII) or name in ("ALL", "NIL", "NONE"):
        raise UserError(f"--env {name!r} must be the name of a variable")
    if name not in environ:
        raise UserError(f"--env {name}: {name} is not set where you launch from: export it, or leave it out")


def _check_mount(mount: str) -> None:
    _check_line("--mount", mount)
    if "," in mount or not re.fullmatch(r"[^:]+(:[^:]+){1,2}", mount):
        raise UserError(f"--mount={mount!r} must be FROM:TO or FROM:TO:OPTION, without commas")


def _sbatch_line(line: str) -> str:
    line = line.removeprefix("#SBATCH").strip()
    if not line.startswith("-") or CONTROL.search(line):
        raise UserError(f"--sbatch={line!r} must be one line of sbatch's options, such as --sbatch=--mail-type=END")
    if re.search(r"(^|\s)(--dep|-d)", line) and DEPENDENCY.fullmatch(line) is None:
        raise UserError(
            f"--sbatch={line!r}: give a dependency as one line without ?, such as --sbatch=--dependency=afterok:7; it "
            "is added to the job's own, which keeps two jobs of a run from training side by side"
        )
    return line


def _env_file(path: str | None) -> str | None:
    if path is None:
        return None
    if not Path(path).is_file():
        raise UserError(f"--env-file={path} is not there: give a file of NAME=value lines, or leave it out")
    if stat.S_IMODE(Path(path).stat().st_mode) & 0o077:
        raise UserError(f"--env-file={path} can be read or written by others than you: chmod 600 it")
    return path


def check_run_dir(run_dir: str) -> None:
    """Slurm reads the path of its log file itself: what it would take for something else is refused."""
    _check_line("run.dir", run_dir)
    if re.search(r'["\\%]', run_dir):
        raise UserError(
            f'run.dir={run_dir!r} holds one of " \\ %, which Slurm reads otherwise in the name of a log file: give '
            "another"
        )


def as_dict(options: SlurmOptions) -> dict[str, Any]:
    """The options as the template sees them."""
    names = (*SlurmOptions.__dataclass_fields__, "processes", "tasks_per_node")
    return {name: getattr(options, name) for name in names}
