"""The options for Slurm.

The checks ensure that no value in the script can break the script or add a line to it. rendering.py writes each comment
on one line. Only --prologue and --template add commands of the user. Those commands must be complete, so that they do
not swallow the lines that follow.
"""

import argparse
import os
import re
import stat
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megatron_paint.base.counts import count_text
from megatron_paint.base.errors import UserError

if TYPE_CHECKING:
    from megatron_paint.config.settings import RunSettings

TEMPLATE = Path(__file__).with_name("slurm.jinja")
# Slurm's own options, whose values are copied into the script: the form of the value, and its meaning.
PLACING = {
    "time": ("D-HH:MM:SS", "time limit of one job; default: the partition's"),
    "account": ("NAME", "account that pays"),
    "partition": ("NAME", "partition"),
    "qos": ("NAME", "quality of service"),
    "constraint": ("FEATURES", "features that a node must have"),
    "reservation": ("NAME", "reservation"),
    "nodelist": ("NODES", "nodes that the job must have"),
    "exclude": ("NODES", "nodes to avoid"),
    "switches": ("N[@TIME]", "most switches between the nodes, and how long to wait for such nodes"),
    "segment": ("N", "nodes of a block that must be close to each other, on clusters with topology/block"),
    "gres": ("LIST", "generic resources of each node; one that names gpu replaces --gpus-per-node"),
    "begin": ("TIME", "earliest start, such as 20:00 or now+2hours"),
    "mail-type": ("EVENTS", "events that send an e-mail, such as END,FAIL"),
    "mail-user": ("ADDRESS", "receiver of the e-mails"),
    "comment": ("TEXT", "comment of the job"),
}
MOST_SIGNAL_SECONDS = 65535  # Slurm's own limit
RESTARTS = 3  # several agents notice a dead rank, and each starts a restart: with two nodes a death may use up two
CONTROL = re.compile(r"[\x00-\x1f\x7f]")
DEPENDENCY = re.compile(
    r"(?:--dependency[= ]|-d ?)([^\s?]+)"
)  # a complete line; with ? any one of several dependencies would suffice
TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<a>\d+)(?::(?P<b>\d+))?(?::(?P<c>\d+))?")
# The allowed form of each value. Slurm parses #SBATCH lines itself: blanks, quotes and `#` would end a value.
NAME = re.compile(r"[\w.+-]+")
PATTERNS: dict[str, tuple[re.Pattern, str]] = {
    "account": (NAME, "a name of letters, digits and . _ + -"),
    "partition": (re.compile(r"[\w.+,-]+"), "names of letters, digits and . _ + -, separated by commas"),
    "qos": (NAME, "a name of letters, digits and . _ + -"),
    "constraint": (re.compile(r"[\w.+,&|*()\[\]!=@-]+"), "feature names, joined by & | , * ( ) [ ]"),
    "reservation": (re.compile(r"[\w.+,-]+"), "names of letters, digits and . _ + -, separated by commas"),
    "nodelist": (re.compile(r"[\w.,\[\]-]+"), "node names such as node[01-03],node07"),
    "exclude": (re.compile(r"[\w.,\[\]-]+"), "node names such as node[01-03],node07"),
    "switches": (re.compile(r"[1-9]\d*(@[\d:-]+)?"), "a number, and optionally a longest wait: 1@2:00:00"),
    "segment": (re.compile(r"[1-9]\d*"), "a number of nodes"),
    "gres": (re.compile(r"[\w.,:/+()-]+"), "resources such as gpu:h100:8,nvme:1"),
    "begin": (re.compile(r"[\w.:/+-]+"), "a time such as 20:00, 2026-12-01T08:00 or now+2hours"),
    "mail-type": (re.compile(r"\w+(,\w+)*"), "events such as END,FAIL"),
    "mail-user": (re.compile(r"[\w.+@-]+"), "an address or a user's name"),
    "comment": (re.compile(r"[\w .,:;+@/=()\[\]-]+"), "letters, digits, blanks and . , : ; + @ / = ( ) [ ] _ -"),
    "job-name": (NAME, "a name of letters, digits and . _ + -"),
    "mem": (re.compile(r"\d+[KMGT]?"), "a number with K, M, G or T, or 0 for all memory of a node"),
    "module": (re.compile(r"[\w.+][\w.+/:=-]*"), "a module's name such as cuda/12.8"),
}


@dataclass(frozen=True, kw_only=True)
class SlurmOptions:
    """Where and how the jobs of a run are executed; None: Slurm's default."""

    nodes: int
    gpus_per_node: int  # 0: nodes without GPUs
    processes_per_node: int
    launcher: Literal["torchrun", "srun"]
    max_restarts: int  # by torchrun within one job
    placing: Mapping[str, str]  # the given ones of time, account, partition, ...
    job_name: str
    cpus_per_task: int | None  # None: all CPUs of a node
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
    attempts: int
    preflight: bool
    prologue: str | None  # shell commands of the job before training
    template: str | None  # file of another template
    copy_settings: bool
    copy_code: bool
    across_nodes: bool  # a tensor-parallel group may be on several nodes
    gpu_memory: float | None  # bytes of a GPU of the nodes

    @property
    def processes(self) -> int:
        """Number of ranks of a job."""
        return self.nodes * self.processes_per_node

    @property
    def tasks_per_node(self) -> int:
        """Slurm tasks per node; torchrun is one task."""
        return 1 if self.launcher == "torchrun" else self.processes_per_node


def make_options(given: argparse.Namespace, *, run: "RunSettings", environ: Mapping[str, str]) -> SlurmOptions:
    """Checks the options. Errors: UserError with the option, its value, the rule and a remedy."""
    from megatron_paint.planning.hardware import parse_gpu_memory  # the parser needs this module, but not that one

    _check_numbers(given)
    _check_combinations(given)
    placing = {name: value for name in PLACING if (value := getattr(given, name.replace("-", "_"))) is not None}
    for name in placing.keys() - {"time"}:
        _check_text(name, placing[name])
    if given.time is not None:
        _check_time(given.time, given.signal_seconds, run.exit_before_limit_s)
    if given.gres is not None:
        _check_gres(given.gres, given.gpus_per_node)
    _check_text("mem", given.mem)
    for module in given.module:
        _check_text("module", module)
    for name in given.env:
        _check_variable(name, environ)
    for option in ("python", "venv", "container", "container_python", "env_file"):
        _check_line(f"--{option.replace('_', '-')}", getattr(given, option))
    for mount in given.mount:
        _check_mount(mount)
    job_name = given.job_name or default_job_name(run.dir)
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
        # A step without --cpus-per-task uses all CPUs of the job, so the job must have all CPUs of its nodes.
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
        attempts=given.attempts,
        preflight=given.preflight,
        prologue=_prologue(given.prologue),
        template=_template(given.template),
        copy_settings=given.copy,
        copy_code=given.copy_code,
        across_nodes=given.tensor_parallel_across_nodes,
        gpu_memory=parse_gpu_memory(given.gpu_memory),
    )


def default_job_name(run_dir: str) -> str:
    """The last two parts of the run folder. One part alone, such as `paint`, is often the same for several runs."""
    parts = Path(run_dir).parts if len(Path(run_dir).parts) > 1 else Path(run_dir).absolute().parts
    return re.sub(r"[^\w.+-]", "_", "-".join(part for part in parts[-2:] if part != "/"))


def check_tensor_parallel_groups(options: SlurmOptions, tensor_parallel: int) -> None:
    """UserError if a tensor-parallel group would have ranks on several nodes, and the user did not ask for that."""
    on_a_node = options.processes_per_node
    if options.nodes > 1 and on_a_node % tensor_parallel and not options.across_nodes:
        raise UserError(
            f"megatron.tensor_model_parallel_size={tensor_parallel} does not divide the {on_a_node} processes of a "
            "node, so a tensor-parallel group would be on several nodes and each layer would wait for the network: "
            "give a size that divides them, another --processes-per-node, or --tensor-parallel-across-nodes"
        )


def _check_numbers(given: argparse.Namespace) -> None:
    limits: dict[str, tuple[int, int | None]] = {
        "nodes": (1, None),
        "gpus_per_node": (0, None),
        "processes_per_node": (1, None),
        "max_restarts": (0, None),
        "cpus_per_task": (1, None),
        "attempts": (1, None),
        "signal_seconds": (1, MOST_SIGNAL_SECONDS),
    }
    for name, (least, most) in limits.items():
        value = getattr(given, name)
        if value is not None and (value < least or (most is not None and value > most)):
            limit = f"at least {least}" if most is None else f"in {least} to {most}"
            raise UserError(f"--{name.replace('_', '-')} must be {limit}, got {value}")


def _check_combinations(given: argparse.Namespace) -> None:
    """Checks options that require or exclude each other."""
    of_container = ("container_runtime", "container_python", "mount")
    alone = [f"--{name.replace('_', '-')}" for name in of_container if getattr(given, name)]
    for wrong, message in (
        (given.python and given.venv, "--python and --venv both set the Python of the job: leave one of them out"),
        (
            given.launcher == "srun" and given.max_restarts,
            f"--max-restarts={given.max_restarts} needs torchrun, and --launcher=srun starts each rank once: leave it "
            "out, or use --launcher=torchrun",
        ),
        (
            alone and not given.container,
            f"{', '.join(alone)} needs a container: give --container IMAGE, or leave it out",
        ),
    ):
        if wrong:
            raise UserError(message)


def _processes_per_node(given: argparse.Namespace) -> int:
    gpus, processes = given.gpus_per_node, given.processes_per_node
    if processes is None:
        if gpus == 0:
            raise UserError(
                "--gpus-per-node=0 means nodes without GPUs, which do not determine the number of ranks: give "
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
    """For values that are quoted in the script: they may contain everything except control characters."""
    if value is not None and (not value or CONTROL.search(value)):
        raise UserError(f"{what}={value!r} must be one line of text without control characters")


def _check_time(text: str, signal_seconds: int, exit_seconds: float) -> None:
    """Slurm's formats of a time limit: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S."""
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
            f"--time={text} is {seconds} s, but --signal-seconds={signal_seconds} requests a checkpoint so many "
            "seconds before its end: give more time, or fewer seconds"
        )
    if seconds <= exit_seconds:
        raise UserError(
            f"--time={text} is {seconds} s, but a run stops run.exit_before_limit_s={exit_seconds:g} s before its end, "
            "so it would stop before its first step: give more time, or set fewer seconds"
        )


def _check_variable(name: str, environ: Mapping[str, str]) -> None:
    """Accepts only a name. The text after a `=` may be a secret, so no message repeats it."""
    name, equals, _ = name.partition("=")
    if equals:
        raise UserError(
            f"--env {name}=... contains a value, which everybody could read in the script and in the process list: "
            f"give --env {name}, and set {name} in the shell in which you launch"
        )
    if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII) or name in ("ALL", "NIL", "NONE"):
        raise UserError(f"--env {name!r} must be the name of a variable")
    if name not in environ:
        raise UserError(f"--env {name}: {name} is not set in this shell: export it, or leave it out")


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
            "is added to the dependency of the job, which prevents two jobs of a run from training at the same time"
        )
    return line


def _check_gres(gres: str, gpus_per_node: int) -> None:
    """Resources that name GPUs must ask for as many as --gpus-per-node, on which the ranks and the preflight rely."""
    asked = [part for part in gres.split(",") if re.fullmatch(r"gpu(:.*)?", part)]
    count = sum(int(match[1]) if (match := re.search(r":(\d+)(?:\(.*\))?$", part)) else 1 for part in asked)
    if asked and count != gpus_per_node:
        raise UserError(
            f"--gres={gres} asks for {count_text(count, 'GPU')} on each node, but --gpus-per-node={gpus_per_node}: "
            "give the same number in both"
        )


def _prologue(path: str | None) -> str | None:
    """The commands in a prologue, which become a part of the script. UserError: they are not valid or not complete."""
    if path is None:
        return None
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prologue={path} cannot be read ({error}): give a file of shell commands") from None
    check_shell(text, f"--prologue={path}")
    last = text.rstrip("\n")
    if (len(last) - len(last.rstrip("\\"))) % 2:
        raise UserError(
            f"--prologue={path} ends in a backslash, which would join its last line and the next line of the script: "
            "remove the backslash, or add the missing line"
        )
    return text if text.endswith("\n") else f"{text}\n"


def check_shell(text: str, what: str) -> None:
    """UserError where bash reports a syntax error, or warns, as of a here-document without an end."""
    if "\0" in text:
        raise UserError(f"{what} contains a NUL character: give shell commands as text")
    # Other variables could add messages, such as a language that this machine does not have.
    environ = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"}
    checked = subprocess.run(["bash", "-n", "-s"], input=text.encode(), capture_output=True, env=environ)
    said = checked.stderr.decode(errors="replace").strip()
    if checked.returncode or said:
        first = said.splitlines()[0].removeprefix("bash: ") if said else "unknown"
        raise UserError(f"{what} is not valid for bash: {first}")


def _template(path: str | None) -> str | None:
    if path is not None and not Path(path).is_file():
        raise UserError(
            f"--template={path} does not exist: give a Jinja template, such as a changed copy of {TEMPLATE}"
        )
    return path


def _env_file(path: str | None) -> str | None:
    if path is None:
        return None
    if not Path(path).is_file():
        raise UserError(f"--env-file={path} does not exist: give a file of NAME=value lines, or leave it out")
    if stat.S_IMODE(Path(path).stat().st_mode) & 0o077:
        raise UserError(f"--env-file={path} can be read or written by other users: run chmod 600 {path}")
    return path


def check_run_dir(run_dir: str) -> None:
    """UserError: run.dir has characters that Slurm would interpret in the path of a log file."""
    _check_line("run.dir", run_dir)
    if re.search(r'["\\%]', run_dir):
        raise UserError(
            f'run.dir={run_dir!r} contains one of " \\ %, which Slurm interprets in the name of a log file: give '
            "another run.dir"
        )


def as_dict(options: SlurmOptions) -> dict[str, Any]:
    """The options as the template sees them."""
    names = (*SlurmOptions.__dataclass_fields__, "processes", "tasks_per_node")
    return {name: getattr(options, name) for name in names}
