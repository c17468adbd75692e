"""`megatron-paint launch search`: a chain of Slurm jobs for each worker of a search.

Each job runs `megatron-paint search` on one node, in the same folder, until no trial is left to take. The journal is
shared, so the file system of the folder must be too.
"""

import argparse
import dataclasses
import os
import shlex
from pathlib import Path

from megatron_paint.base.counts import count_text
from megatron_paint.base.errors import UserError
from megatron_paint.config.load import load_settings
from megatron_paint.config.saved import to_yaml
from megatron_paint.config.settings import Settings
from megatron_paint.config.tree import settings_tree
from megatron_paint.launch.slurm.options import SlurmOptions, check_run_dir, default_job_name, make_options
from megatron_paint.launch.slurm.rendering import log_file, render_worker
from megatron_paint.launch.slurm.submission import submit
from megatron_paint.planning.layout import fewest_processes
from megatron_paint.runtime.files import write_atomically
from megatron_paint.search.folder import open_folder
from megatron_paint.search.space import Space, read_space, search_tree

COPIES = "logs"  # folder of the scripts, and of the copies of settings and space that the jobs read


def launch(given: argparse.Namespace) -> int:
    """Submits the jobs of all workers, or prints what would be submitted. Returns the exit status.

    Errors: UserError if settings, space, an option or an input is wrong, or if sbatch refuses.
    """
    _check_jobs(given)
    asked = load_settings(given.config, given.overrides)
    space = read_space(given.space, asked)
    out = given.out or Path(f"{asked.run.dir}_search")
    check_run_dir(str(out))
    options = _options(given, asked, out)
    if given.check:
        _check_inputs(space, given)
    scripts = {worker: worker_script(given, options, out, worker) for worker in range(1, given.workers + 1)}
    files = {worker: (out / COPIES / f"worker_{worker}.sbatch").absolute() for worker in scripts}
    commands = [["sbatch", "--parsable", str(file)] for file in files.values() for _ in range(given.attempts)]
    if given.dry_run:
        print("\n".join(scripts.values()))
        print("# would be submitted with:")
        for command in commands:
            print(f"# {shlex.join(command)}")
        return 0
    open_folder(out, search_tree(space, seed=given.seed))
    _write_copies(out, space)
    for worker, script in scripts.items():
        write_atomically(files[worker], script)
    jobs: list[str] = []
    for command in commands:
        try:
            jobs.append(submit(command))
        except UserError as error:
            left = f". Before that, jobs {' '.join(jobs)} were submitted: `scancel` cancels them" if jobs else ""
            raise UserError(f"{error}{left}") from error
    print(f"submitted  {', '.join(jobs)}; console {log_file(out, jobs[0])}")
    print(f"report     megatron-paint search {' '.join(_arguments(given, out)[1:])} --report-only")
    return 0


def worker_script(given: argparse.Namespace, options: SlurmOptions, out: Path, worker: int) -> str:
    """The batch script of one worker, whose jobs wait for each other and not for those of other workers."""
    own = dataclasses.replace(options, job_name=f"{options.job_name}-{worker}")
    title = f"{given.config}: worker {worker} of {given.workers} of a search of {count_text(given.trials, 'trial')}"
    return render_worker(own, arguments=_arguments(given, out), out=str(out), title=title)


def _arguments(given: argparse.Namespace, out: Path) -> list[str]:
    """Those of `megatron-paint` in a job. Settings and space are the copies."""
    words = ["search", str(out / COPIES / "settings.yaml"), str(out / COPIES / "space.yaml")]
    words += ["--trials", str(given.trials), "--jobs", str(given.jobs), "--seed", str(given.seed), "--out", str(out)]
    return words if given.processes is None else [*words, "--processes", str(given.processes)]


def _options(given: argparse.Namespace, settings: Settings, out: Path) -> SlurmOptions:
    """The options, checked as those of a run."""
    if given.container and given.container_runtime != "apptainer":
        raise UserError(
            "--container: a worker of a search runs in the batch script, without srun, and pyxis needs srun: give "
            "--container-runtime=apptainer"
        )
    given.processes_per_node = given.gpus_per_node or given.jobs * (given.processes or _replica(settings))
    given.job_name = given.job_name or default_job_name(str(out))
    return make_options(given, run=settings.run, environ=os.environ)


def _check_jobs(given: argparse.Namespace) -> None:
    """UserError: there are fewer GPUs than trials side by side, or than ranks of one of them."""
    gpus = given.gpus_per_node
    if not gpus:
        return
    if given.jobs > gpus:
        raise UserError(
            f"--jobs={given.jobs} is above --gpus-per-node={gpus}, which the trials of a worker divide: give at most "
            "as many"
        )
    if given.processes is not None and given.processes > (share := gpus // given.jobs):
        raise UserError(
            f"--processes={given.processes} is above the number of GPUs of a trial, {share}: --jobs={given.jobs} "
            f"trials divide --gpus-per-node={gpus}, and each process drives one. Give at most {share}, or fewer --jobs"
        )


def _check_inputs(space: Space, given: argparse.Namespace) -> None:
    """Reads what the trials will read, except the weights themselves."""
    from megatron_paint.search.checks import check_trials
    from megatron_paint.search.final import load_problems

    processes = given.processes or given.gpus_per_node // given.jobs or _replica(space.given)
    for line in check_trials(space, load_problems(space), processes=processes):
        print(f"# {line}")


def _replica(settings: Settings) -> int:
    """Ranks of one replica of the model."""
    return fewest_processes(settings.megatron)


def _write_copies(out: Path, space: Space) -> None:
    head = "# Made by `megatron-paint launch search`; the jobs read this copy.\n"
    tree = search_tree(space, seed=0)
    write_atomically(out / COPIES / "settings.yaml", head + to_yaml(settings_tree(space.given)))
    write_atomically(out / COPIES / "space.yaml", head + to_yaml(tree["space"]))
