"""`megatron-paint launch slurm`: checks settings and inputs, writes the script into the run folder, and submits it."""

import argparse
import dataclasses
import getpass
import os
import shlex
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_paint.base.counts import count_text
from megatron_paint.base.errors import UserError, about
from megatron_paint.config.load import load_settings
from megatron_paint.config.settings import Settings
from megatron_paint.launch.slurm.attempts import record_launch
from megatron_paint.launch.slurm.copies import code_folder, settings_copy, write_code, write_settings
from megatron_paint.launch.slurm.options import (
    SlurmOptions,
    check_run_dir,
    check_tensor_parallel_groups,
    make_options,
)
from megatron_paint.launch.slurm.rendering import RESUME, log_file, render
from megatron_paint.models.shape import ModelShape
from megatron_paint.planning.layout import data_parallel_size
from megatron_paint.planning.local_model import with_local_model
from megatron_paint.planning.memory import Plan, make_plan
from megatron_paint.run.folder import RunFolder
from megatron_paint.runtime.files import write_atomically

Check = Callable[[Settings, ModelShape], Sequence[str]]


def launch(given: argparse.Namespace, *, check_inputs: Check) -> int:
    """Submits the run's jobs, or prints what would be submitted. Returns the exit status.

    check_inputs: reads data, tokenizer and the weights' headers, and returns lines about them; not called with
    --no-check. Errors: UserError if the settings cannot run on so many ranks, if an input or an option is wrong, or if
    sbatch refuses.
    """
    asked = load_settings(given.config, [*given.overrides, RESUME])
    texts = [
        ("", str(given.config)),
        *(("", text) for text in given.overrides),
        ("model.hf_path=", asked.model.hf_path),
    ]
    for what, text in texts:
        if not text.isprintable():
            raise UserError(f"{what}{text!r} must be one line of text without control characters")
    settings = with_local_model(asked) if given.check else asked
    check_run_dir(settings.run.dir)
    options = make_options(given, run=settings.run, environ=os.environ)
    plan = _visible_plan(settings, options, is_checked=given.check)
    RunFolder(settings.run.dir).check(settings)
    notes = _check(settings, plan, check_inputs) if given.check else ()
    source, overrides = str(given.config), given.overrides
    copy, text = settings_copy(asked, source=source, overrides=overrides)
    code = _searchable(code_folder(settings.run.dir)) if options.copy_code else None
    script = render(
        options,
        settings_file=copy if options.copy_settings else source,
        overrides=() if options.copy_settings else overrides,
        run_dir=settings.run.dir,
        title=source,
        plan=_plan_lines(plan, settings),
        code=None if code is None else str(code),
    )
    file = RunFolder(settings.run.dir).logs.absolute() / "launch.sbatch"
    command = ["sbatch", "--parsable", str(file)]
    if given.dry_run:
        print(script)
        print("# would be submitted with:")
        for _ in range(options.attempts):
            print(f"# {shlex.join(command)}")
        return 0
    print("\n".join([*_plan_lines(plan, settings), *notes]))
    earlier = _earlier_jobs(options.job_name, file)
    if options.copy_settings:
        write_settings(copy, text)
    if code is not None:
        write_code(code)
    write_atomically(file, script)
    jobs = _submit_all(command, options, settings)
    print(f"submitted  {', '.join(jobs)}; console {log_file(settings.run.dir, jobs[0])}")
    if earlier:
        print(
            f"           they wait for earlier jobs of this run, because one job runs at a time: {', '.join(earlier)}"
        )
    return 0


def plan_elsewhere(settings: Settings, options: SlurmOptions) -> Plan:
    """The plan of a job, without the checks that only a GPU node can do."""
    try:
        plan = make_plan(
            settings if options.gpus_per_node else _without_gpu_checks(settings),
            processes=options.processes,
            gpu_memory=options.gpu_memory,
            ranks_per_node=options.processes_per_node,
            on_gpu_nodes=options.gpus_per_node > 0,
        )
    except UserError as error:
        if str(error).startswith("model.hf_path: "):  # no number of nodes helps
            raise
        with about(f"--nodes={options.nodes} with {count_text(options.processes_per_node, 'process')} a node"):
            raise UserError(str(error).replace(" (nearest: --processes ", " (nearest: ")) from None
    check_tensor_parallel_groups(options, plan.tensor_parallel)
    return plan


def _without_gpu_checks(settings: Settings) -> Settings:
    """The settings without what this machine would have to have for nodes without GPUs."""
    given = settings.megatron
    layers = "local" if given.transformer_impl == "local" else "auto"
    megatron = dataclasses.replace(given, fp8=None, transformer_impl=layers, deterministic_mode=False)
    kernel = "torch" if settings.objective.kernel == "torch" else "auto"
    objective = dataclasses.replace(settings.objective, kernel=kernel)
    return dataclasses.replace(settings, megatron=megatron, objective=objective)


def _visible_plan(settings: Settings, options: SlurmOptions, *, is_checked: bool) -> Plan | None:
    """The plan; None if this machine does not see the model's folder, which --no-check allows."""
    if is_checked or Path(settings.model.hf_path).is_dir():
        return plan_elsewhere(settings, options)
    check_tensor_parallel_groups(options, settings.megatron.tensor_model_parallel_size)
    data_parallel_size(options.processes, settings.megatron)
    return None


def _check(settings: Settings, plan: Plan, check_inputs: Check) -> Sequence[str]:
    try:
        return check_inputs(settings, plan.shape)
    except UserError as error:
        raise UserError(f"{error} (--no-check skips this check, if only the nodes see the files)") from None


def _plan_lines(plan: Plan | None, settings: Settings) -> list[str]:
    """The lines of the plan that hold on the nodes too, and its warnings."""
    if plan is None:
        return [f"no plan and no estimate of memory: this machine does not see model.hf_path={settings.model.hf_path}"]
    of_this_machine = ("layers ", "loss ")
    lines = [line for line in plan.lines(settings) if not line.startswith(of_this_machine)]
    return [*lines, *(f"warning: {warning}" for warning in plan.warnings())]


def _searchable(code: Path) -> Path:
    """The folder of the copied code. UserError: Python would not find the folder, and would use other code."""
    if ":" in str(code):
        raise UserError(
            f"--copy-code puts the copy into {code}, and Python splits its search path at each `:`, so the jobs would "
            "use other code: give a run.dir whose complete path has no `:`, or leave out --copy-code"
        )
    return code


def _submit_all(command: list[str], options: SlurmOptions, settings: Settings) -> list[str]:
    """Submits every job of the chain and returns their ids. UserError: sbatch refuses one."""
    undo = record_launch(Path(settings.run.dir), steps=settings.run.steps)
    jobs: list[str] = []
    try:
        for _ in range(options.attempts):
            jobs.append(submit(command))
    except UserError as error:
        if not jobs:
            undo()
            raise
        raise UserError(
            f"{error}. {len(jobs):,} of {count_text(options.attempts, 'job')} were submitted before that and still "
            f"exist: `scancel {' '.join(jobs)}` cancels them"
        ) from error
    return jobs


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


def submit(command: list[str]) -> str:
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
