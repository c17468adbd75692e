"""`megatron-paint train`: checks the settings before torch is imported, then trains here or starts the ranks.

Imports are in the functions that need them: a mistake in the settings waits for none of them.
"""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_paint.base.counts import count_text
from megatron_paint.base.errors import UserError
from megatron_paint.cli.ranks import console_mode, number_of_ranks, rank_environment_of, start_ranks_here
from megatron_paint.config.load import load_settings
from megatron_paint.config.settings import Settings
from megatron_paint.planning.layout import check_model, trainer_samples
from megatron_paint.planning.local_model import with_local_model
from megatron_paint.runtime.processes import has_launcher

if TYPE_CHECKING:
    from megatron_paint.models.shape import ModelShape
    from megatron_paint.run.console import Progress
    from megatron_paint.run.lock import RunLock
    from megatron_paint.training.inputs import Inputs


def run(options: argparse.Namespace, arguments: list[str]) -> int:
    """Trains, or only checks; returns the exit status. Without a rank environment, it starts the ranks."""
    environment = rank_environment_of(options)
    settings = with_local_model(load_settings(options.config, options.overrides))
    check_model(settings.model, settings.megatron, settings.rollout, samples=trainer_samples(settings))
    if options.log_every < 1:
        raise UserError(f"--log-every={options.log_every} is below 1: give the steps between two printed lines")
    if environment is not None:
        if options.dry_run and environment.rank == 0:
            _check_and_print_plan(settings, options, environment.size, _progress(settings, options), is_rank=True)
        return 0 if options.dry_run else _train(settings, options, prints_plan=not has_launcher())
    trains = not options.dry_run and not options.self_check
    if trains and _printed_results(settings, options):
        return 0
    processes = number_of_ranks(settings.megatron, options, environment)
    progress = _progress(settings, options)
    inputs = _check_and_print_plan(settings, options, processes, progress)
    if options.dry_run:
        return 0
    if trains:
        return _own_and_train(settings, options, arguments, processes, progress, inputs)
    return _start(settings, options, arguments, processes, progress, inputs)


def _progress(settings: Settings, options: argparse.Namespace) -> "Progress":
    """The console of this process. What it prints goes into the run's log as soon as the run has a folder."""
    from megatron_paint.run.console import Progress
    from megatron_paint.run.console_log import ConsoleLog

    mode = "normal" if options.dry_run else console_mode(options)
    return Progress(mode, steps=settings.run.steps, log=ConsoleLog())


def _printed_results(settings: Settings, options: argparse.Namespace) -> bool:
    """Whether the run is finished with the same settings. Its results are printed then, without torch or ranks."""
    from megatron_paint.run.console import Progress
    from megatron_paint.run.folder import RunFolder
    from megatron_paint.run.results import is_finished, print_results

    folder = RunFolder(settings.run.dir)
    if not is_finished(folder, settings):
        return False
    progress = Progress(console_mode(options), steps=settings.run.steps)
    progress.note(
        f"{folder.path} has all {count_text(settings.run.steps, 'step')} with these settings: nothing is left to do"
    )
    print_results(folder, progress, last=settings.run.steps)
    return True


def _check_and_print_plan(
    settings: Settings, options: argparse.Namespace, processes: int, progress: "Progress", *, is_rank: bool = False
) -> "Inputs":
    """Prints the plan, then checks the data and prints its size. One process finds a mistake within seconds.

    The plan needs only the settings and config.json, so it is printed before data and weights are read.
    """
    from megatron_paint.planning.hardware import parse_gpu_memory, ranks_of_this_node
    from megatron_paint.planning.memory import make_plan

    plan = make_plan(
        settings,
        processes=processes,
        gpu_memory=parse_gpu_memory(options.gpu_memory),
        # Without a rank environment the ranks are started here, whatever step a shell of Slurm belongs to.
        ranks_per_node=ranks_of_this_node(os.environ) if is_rank else None,
    )
    inputs = None
    if not _data_exists(settings):
        inputs = _check_inputs(settings, options, plan.shape, progress)
    for line in plan.lines(settings):
        progress.note(line)
    for warning in plan.warnings():
        progress.warn(warning)
    inputs = inputs or _check_inputs(settings, options, plan.shape, progress)
    for line in inputs.summary():
        progress.note(line)
    for warning in inputs.warnings:
        progress.warn(warning)
    if options.dry_run:
        progress.note("dry run    no error was found; nothing was started")
    return inputs


def _data_exists(settings: Settings) -> bool:
    """Whether all problem files exist. Otherwise the data is checked first: what is missing is the only line then."""
    sources = (settings.data.train, settings.evaluation.problems)
    return all(source is None or Path(source).exists() for source in sources)


def _check_inputs(
    settings: Settings, options: argparse.Namespace, shape: "ModelShape", progress: "Progress"
) -> "Inputs":
    from megatron_paint.training.inputs import check_inputs  # imports transformers: usually after the plan is printed

    with progress.live(plain=True):
        return check_inputs(settings, shape, run_folder=not options.self_check)


def _own_and_train(
    settings: Settings,
    options: argparse.Namespace,
    arguments: list[str],
    processes: int,
    progress: "Progress",
    inputs: "Inputs",
) -> int:
    """Trains as the owner of the run folder, whose log gets everything that is printed."""
    from megatron_paint.run.folder import RunFolder
    from megatron_paint.run.lock import locked
    from megatron_paint.training.ownership import end_process

    folder = RunFolder(settings.run.dir)
    on_lost = end_process if processes == 1 else None  # a launcher hears of it from rank 0
    own = locked(folder.path, say=progress.warn, on_lost=on_lost, on_wait=progress.note)
    with own as lock, progress.logging(folder.logs, arguments):
        try:
            return _start(settings, options, arguments, processes, progress, inputs, lock=lock)
        except KeyboardInterrupt:
            progress.log.add("megatron-paint: ended by SIGINT")
            raise KeyboardInterrupt(folder.kept_text()) from None


def _start(
    settings: Settings,
    options: argparse.Namespace,
    arguments: list[str],
    processes: int,
    progress: "Progress",
    inputs: "Inputs",
    *,
    lock: "RunLock | None" = None,
) -> int:
    """Trains in this process, or in ranks that it starts here."""
    from megatron_paint.run.folder import RunFolder

    folder = RunFolder(settings.run.dir)

    def interrupted() -> str:
        return (
            "megatron-paint: SIGINT: the run stops after this step, with a checkpoint. Press Ctrl-C again to end it at "
            f"once; {folder.kept_text()}"
        )

    if processes > 1:
        from megatron_paint.training.inputs import save_checked_problems
        from megatron_paint.training.ownership import share_lock

        def prepare(notes: str) -> None:
            save_checked_problems(inputs, notes)
            if lock is not None:
                share_lock(lock, notes)

        what = {"interrupted": interrupted, "kept": folder.kept_text} if lock is not None else {}
        return start_ranks_here(arguments, processes, progress, prepare=prepare, **what)
    from megatron_paint.launch.loopback import loopback

    on_interrupt = (lambda: progress.on_stderr(interrupted())) if lock is not None else (lambda: None)
    with loopback(os.environ):
        return _train(
            settings, options, prints_plan=False, inputs=inputs, lock=lock, log=progress.log, on_interrupt=on_interrupt
        )


def _train(settings: Settings, options: argparse.Namespace, **more: Any) -> int:
    from megatron_paint.runtime.stop import exit_status
    from megatron_paint.training.start import train

    finished = train(
        settings,
        mode=console_mode(options),
        log_every=options.log_every,
        self_check_only=options.self_check,
        **more,
    )
    return 0 if finished else exit_status()
