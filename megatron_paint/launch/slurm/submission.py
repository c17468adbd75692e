"""`megatron-paint launch slurm`: checks the settings, writes the script into the run folder, and submits it."""

import argparse
import dataclasses
import getpass
import os
import shlex
import subprocess
from pathlib import Path

from megatron_paint.base.errors import UserError, about
from megatron_paint.config.load import load_settings
from megatron_paint.config.settings import Settings
from megatron_paint.launch.slurm.attempts import record_launch
from megatron_paint.launch.slurm.options import SlurmOptions, check_run_dir, make_options
from megatron_paint.launch.slurm.rendering import RESUME, log_file, render
from megatron_paint.planning.local_model import with_local_model
from megatron_paint.planning.memory import Plan, make_plan
from megatron_paint.run.folder import RunFolder
from megatron_paint.runtime.files import write_atomically


def launch(given: argparse.Namespace) -> int:
    """Submits the run's jobs, or prints what would be submitted. Returns the exit status.

    Errors: UserError if the settings cannot run on so many ranks, if an option is wrong, or if sbatch refuses.
    """
    settings = with_local_model(load_settings(given.config, [*given.overrides, RESUME]))
    check_run_dir(settings.run.dir)
    for text in (str(given.config), *given.overrides):
        if not text.isprintable():
            raise UserError(f"{text!r} must be one line of text without control characters")
    options = make_options(given, run=settings.run, environ=os.environ)
    plan = plan_elsewhere(settings, options)
    RunFolder(settings.run.dir).check(settings)
    script = render(options, settings_file=str(given.config), overrides=given.overrides, run_dir=settings.run.dir)
    file = RunFolder(settings.run.dir).logs.absolute() / "launch.sbatch"
    command = ["sbatch", "--parsable", str(file)]
    if given.dry_run:
        print(script)
        print("# would be submitted with:")
        for _ in range(options.attempts):
            print(f"# {shlex.join(command)}")
        return 0
    print("\n".join(plan.lines(settings)[1:2]))
    earlier = _earlier_jobs(options.job_name, file)
    write_atomically(file, script)
    undo = record_launch(Path(settings.run.dir), steps=settings.run.steps)
    jobs: list[str] = []
    try:
        for _ in range(options.attempts):
            jobs.append(_submit(command))
    except UserError as error:
        if not jobs:
            undo()
            raise
        raise UserError(
            f"{error}. {len(jobs)} of {options.attempts} jobs were submitted before that and still exist: "
            f"`scancel {' '.join(jobs)}` cancels them"
        ) from error
    print(f"submitted  {', '.join(jobs)}; console {log_file(settings.run.dir, jobs[0])}")
    if earlier:
        print(
            f"           they wait for earlier jobs of this run, because one job runs at a time: {', '.join(earlier)}"
        )
    return 0


def plan_elsewhere(settings: Settings, options: SlurmOptions) -> Plan:
    """The plan of a job, made on a machine that may have no GPU: what only a GPU node can check is left out.

    UserError: the settings do not fit so many ranks; it names --nodes and the ranks of a node.
    """
    megatron = dataclasses.replace(settings.megatron, fp8=None, transformer_impl="auto", deterministic_mode=False)
    objective = dataclasses.replace(settings.objective, kernel="auto")
    try:
        return make_plan(
            dataclasses.replace(settings, megatron=megatron, objective=objective), processes=options.processes
        )
    except UserError as error:
        with about(f"--nodes={options.nodes} with {options.processes_per_node} processes a node"):
            raise UserError(str(error).replace(" (nearest: --processes ", " (nearest: ")) from None


def _earlier_jobs(job_name: str, file: Path) -> list[str]:
    """Ids of the run's jobs that already wait or run.

    The jobs of a run find each other by their name: they wait for each other and cancel jobs that are no longer needed.
    UserError: the name belongs to another run, or the run has jobs with another name.
    """
    query = ["squeue", "--noheader", f"--user={getpass.getuser()}", "--format=%i|%j|%o"]
    try:
        queued = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return []  # sbatch will report the problem
    jobs = []
    for line in queued:
        if len(parts := line.split("|", 2)) < 3:
            continue
        job, name, script = (part.strip() for part in parts)
        is_ours = script == str(file)
        if is_ours and name != job_name:
            raise UserError(
                f"--job-name={job_name}: job {job} of this run has the name {name}, and only jobs with the same name "
                f"wait for each other: give --job-name={name}, or cancel that job"
            )
        if name == job_name and not is_ours:
            raise UserError(
                f"--job-name={job_name}: job {job} of yours has this name and belongs to another run: give another "
                "--job-name"
            )
        if is_ours:
            jobs.append(job)
    return jobs


def _submit(command: list[str]) -> str:
    """The id of the job."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError(
            "sbatch was not found: launch from a machine that submits to Slurm, or add --dry-run to see the script"
        ) from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise UserError(f"sbatch refused the job: {'; '.join(lines)}. The script is {command[-1]}")
    return done.stdout.strip().partition(";")[0]
