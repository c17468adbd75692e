"""The options of `megatron-paint launch slurm`; what they hold is checked in options.py."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_paint.launch.slurm.options import PLACING


def add_commands(commands: Any) -> None:
    """Adds `slurm` to the subparsers of `launch`."""
    slurm = commands.add_parser("slurm", help="write one batch script and submit it with sbatch")
    slurm.add_argument("config", type=Path, metavar="SETTINGS.yaml")
    slurm.add_argument("overrides", nargs="*", metavar="key=value", help="such as optimizer.lr=1e-5")
    slurm.add_argument("--dry-run", action="store_true", help="print the script and the commands; touch nothing")
    slurm.add_argument("--links", type=int, default=1, metavar="K", help="jobs, one after another, that share the run")
    slurm.add_argument("--no-preflight", dest="preflight", action="store_false", help="leave the check of nodes out")
    _add_size(slurm)
    for name, (value, meaning) in PLACING.items():
        slurm.add_argument(f"--{name}", metavar=value, help=meaning)
    slurm.add_argument("--job-name", metavar="NAME", help="default: the name of run.dir")
    slurm.add_argument(
        "--sbatch", action="append", default=[], metavar="--extra=line", help="one more #SBATCH line; repeatable"
    )
    _add_environment(slurm)
    slurm.set_defaults(run=_run)


def _add_size(slurm: argparse.ArgumentParser) -> None:
    slurm.add_argument("--nodes", type=int, required=True, metavar="N", help="nodes of each job")
    slurm.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="0: nodes without GPUs; default: 8")
    slurm.add_argument("--processes-per-node", type=int, metavar="N", help="ranks on a node; default: one a GPU")
    slurm.add_argument(
        "--launcher",
        choices=("torchrun", "srun"),
        default="torchrun",
        help="torchrun: one a node, restarts ranks that fail; srun: one Slurm task a rank",
    )
    slurm.add_argument(
        "--max-restarts", type=int, metavar="R", help="of torchrun, within a job, before the job ends; default: 3"
    )
    slurm.add_argument(
        "--cpus-per-task",
        type=int,
        metavar="N",
        help="CPUs of a Slurm task, which is a whole node's with torchrun and a rank's with srun; default: whole nodes",
    )
    slurm.add_argument("--mem", default="0", metavar="SIZE", help="memory of a node; default: 0, all of it")
    slurm.add_argument("--exclusive", action="store_true", help="share nodes with no other job")
    slurm.add_argument(
        "--signal-seconds",
        type=int,
        default=300,
        metavar="S",
        help="a checkpoint is asked for so many seconds before the time limit; default: 300",
    )


def _add_environment(slurm: argparse.ArgumentParser) -> None:
    slurm.add_argument("--venv", metavar="PATH", help="virtual environment that the job runs in")
    slurm.add_argument("--python", metavar="PATH", help="or its Python; default: the one that runs this command")
    slurm.add_argument("--module", action="append", default=[], metavar="NAME", help="`module load NAME`; repeatable")
    slurm.add_argument("--container", metavar="IMAGE", help="image that the ranks run in")
    slurm.add_argument("--container-runtime", choices=("pyxis", "apptainer"), help="default: pyxis")
    slurm.add_argument("--container-python", metavar="PATH", help="Python in the image; default: python3")
    slurm.add_argument(
        "--mount", action="append", default=[], metavar="FROM:TO", help="mount into the image; repeatable"
    )
    slurm.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME",
        help="pass this variable of yours to the job, by its name alone; repeatable. Nothing else is passed",
    )
    slurm.add_argument("--env-file", metavar="PATH", help="file that the job sources; nobody else may read it")


def join_sbatch_lines(arguments: Sequence[str]) -> list[str]:
    """Takes `--sbatch --extra=line` for `--sbatch=--extra=line`: argparse takes no value that begins with a dash."""
    joined: list[str] = []
    for argument in arguments:
        if joined and joined[-1] == "--sbatch" and argument.startswith("-"):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def _run(options: argparse.Namespace, _: list[str]) -> int:
    from megatron_paint.launch.slurm.submission import launch

    return launch(options)
