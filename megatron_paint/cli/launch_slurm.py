"""The options of `megatron-paint launch slurm`. options.py checks their values."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_paint.launch.slurm.options import PLACING

if TYPE_CHECKING:
    from megatron_paint.config.settings import Settings
    from megatron_paint.models.shape import ModelShape


def add_commands(commands: Any) -> None:
    """Adds `slurm` to the subparsers of `launch`."""
    slurm = commands.add_parser("slurm", help="write a batch script and submit it with sbatch")
    slurm.add_argument("config", type=Path, metavar="SETTINGS.yaml")
    slurm.add_argument("overrides", nargs="*", metavar="key=value", help="changed settings, such as optimizer.lr=1e-5")
    slurm.add_argument("--dry-run", action="store_true", help="print the script and the commands; change nothing")
    slurm.add_argument(
        "--attempts", type=int, default=1, metavar="K", help="submit K jobs that continue the run one after another"
    )
    slurm.add_argument(
        "--no-check",
        dest="check",
        action="store_false",
        help="do not read data, tokenizer and weights; for login nodes that do not see them",
    )
    slurm.add_argument("--no-preflight", dest="preflight", action="store_false", help="skip the check of the nodes")
    slurm.add_argument("--nodes", type=int, required=True, metavar="N", help="nodes per job")
    _add_ranks(slurm)
    add_node_options(slurm)
    slurm.add_argument("--template", metavar="FILE", help="Jinja template of the script; default: slurm.jinja")
    add_environment_options(slurm)
    slurm.add_argument(
        "--no-copy",
        dest="copy",
        action="store_false",
        help="jobs read the settings file itself, not a copy in the run folder",
    )
    slurm.add_argument(
        "--copy-code", action="store_true", help="jobs use a copy of this package's code, made now in the run folder"
    )
    slurm.set_defaults(run=_run)


def _add_ranks(slurm: argparse.ArgumentParser) -> None:
    slurm.add_argument("--processes-per-node", type=int, metavar="N", help="ranks per node; default: one per GPU")
    slurm.add_argument(
        "--launcher",
        choices=("torchrun", "srun"),
        default="torchrun",
        help="torchrun: one torchrun per node, which restarts failed ranks; srun: one Slurm task per rank",
    )
    slurm.add_argument(
        "--max-restarts",
        type=int,
        metavar="R",
        help="restarts by torchrun within a job before the job ends; default: 3",
    )
    slurm.add_argument(
        "--gpu-memory",
        metavar="SIZE",
        help="memory of a GPU of the nodes, such as 80GB; the estimate is compared with it",
    )
    slurm.add_argument(
        "--tensor-parallel-across-nodes",
        action="store_true",
        help="allow tensor-parallel groups with ranks on several nodes",
    )


def add_node_options(slurm: argparse.ArgumentParser) -> None:
    """Adds what every kind of job asks Slurm for."""
    slurm.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="0: nodes without GPUs; default: 8")
    slurm.add_argument(
        "--cpus-per-task",
        type=int,
        metavar="N",
        help="CPUs per Slurm task: per node with torchrun, per rank with srun; default: complete nodes",
    )
    slurm.add_argument("--mem", default="0", metavar="SIZE", help="memory per node; default: 0, all of it")
    slurm.add_argument("--exclusive", action="store_true", help="use nodes exclusively, without other jobs")
    slurm.add_argument(
        "--signal-seconds",
        type=int,
        default=300,
        metavar="S",
        help="request a checkpoint so many seconds before the time limit; default: 300",
    )
    for name, (value, meaning) in PLACING.items():
        slurm.add_argument(f"--{name}", metavar=value, help=meaning)
    slurm.add_argument("--job-name", metavar="NAME", help="default: the last two parts of run.dir")
    slurm.add_argument(
        "--sbatch", action="append", default=[], metavar="--extra=line", help="an additional #SBATCH line; repeatable"
    )


def add_environment_options(slurm: argparse.ArgumentParser) -> None:
    """Adds the environment of the processes of a job."""
    slurm.add_argument("--venv", metavar="PATH", help="virtual environment of the job")
    slurm.add_argument(
        "--python",
        metavar="PATH",
        help="Python of the job, instead of --venv; default: the Python that runs this command",
    )
    slurm.add_argument("--module", action="append", default=[], metavar="NAME", help="`module load NAME`; repeatable")
    slurm.add_argument("--prologue", metavar="FILE", help="shell commands that the job runs before training")
    slurm.add_argument("--container", metavar="IMAGE", help="container image of the ranks")
    slurm.add_argument("--container-runtime", choices=("pyxis", "apptainer"), help="default: pyxis")
    slurm.add_argument("--container-python", metavar="PATH", help="Python in the image; default: python3")
    slurm.add_argument(
        "--mount", action="append", default=[], metavar="FROM:TO", help="mount a folder into the container; repeatable"
    )
    slurm.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME",
        help="pass this environment variable to the job, by name; repeatable. No other variable is passed",
    )
    slurm.add_argument("--env-file", metavar="PATH", help="file that the job sources; only you may have access to it")


def join_sbatch_lines(arguments: Sequence[str]) -> list[str]:
    """Joins `--sbatch --extra=line` to `--sbatch=--extra=line`: argparse accepts no value that begins with a dash."""
    joined: list[str] = []
    for argument in arguments:
        if joined and joined[-1] == "--sbatch" and argument.startswith("-"):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def _run(options: argparse.Namespace, _: list[str]) -> int:
    from megatron_paint.launch.slurm.submission import launch

    return launch(options, check_inputs=_check_inputs)


def _check_inputs(settings: "Settings", shape: "ModelShape") -> tuple[str, ...]:
    """Reads what the job will read, except the weights themselves. Returns lines about the data."""
    from megatron_paint.training.inputs import check_inputs

    return check_inputs(settings, shape, run_folder=False).summary()
