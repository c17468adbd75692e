"""`megatron-paint train`: checks the settings before torch is imported, then trains here or starts the ranks.

Imports are in the functions that need them: a mistake in the settings waits for none of them.
"""

import argparse
import os
from functools import partial
from typing import TYPE_CHECKING

from megatron_paint.cli.ranks import console_mode, number_of_ranks, rank_environment_of, start_ranks_here
from megatron_paint.config.load import load_settings
from megatron_paint.config.settings import Settings
from megatron_paint.planning.layout import check_model
from megatron_paint.runtime.processes import has_launcher

if TYPE_CHECKING:
    from megatron_paint.training.inputs import Inputs


def run(options: argparse.Namespace, arguments: list[str]) -> int:
    """Trains, or only checks; returns the exit status. Without a rank environment, it starts the ranks."""
    environment = rank_environment_of(options)
    settings = load_settings(options.config, options.overrides)
    check_model(settings.model, settings.megatron, settings.rollout)
    trains = not options.dry_run and not options.self_check
    if environment is None and trains and _printed_results(settings, options):
        return 0
    processes = number_of_ranks(settings.megatron, options, environment)
    inputs = None
    if environment is None or (options.dry_run and environment.rank == 0):
        inputs = _check_and_print_plan(settings, options, processes)
    if options.dry_run:
        return 0
    if environment is not None:
        return _train(settings, options, prints_plan=not has_launcher())
    if processes > 1:
        from megatron_paint.training.inputs import save_checked_problems

        return start_ranks_here(arguments, processes, options, prepare=partial(save_checked_problems, inputs))
    from megatron_paint.launch.loopback import loopback

    with loopback(os.environ):
        return _train(settings, options, prints_plan=False, inputs=inputs)


def _printed_results(settings: Settings, options: argparse.Namespace) -> bool:
    """Whether the run is finished with the same settings. Its results are printed then, without torch or ranks."""
    from megatron_paint.run.console import Progress
    from megatron_paint.run.folder import RunFolder
    from megatron_paint.run.results import is_finished, print_results

    folder = RunFolder(settings.run.dir)
    if not is_finished(folder, settings):
        return False
    progress = Progress(console_mode(options), steps=settings.run.steps)
    progress.note(f"{folder.path} has all {settings.run.steps} steps with these settings: nothing is left to do")
    print_results(folder, progress, last=settings.run.steps)
    return True


def _check_and_print_plan(settings: Settings, options: argparse.Namespace, processes: int) -> "Inputs":
    """Prints the plan, then checks the data and prints its size. One process finds a mistake within seconds.

    The plan needs only the settings and config.json, so it is printed before data and weights are read.
    """
    from megatron_paint.planning.hardware import parse_gpu_memory, ranks_of_this_node
    from megatron_paint.planning.memory import make_plan
    from megatron_paint.run.console import Progress

    progress = Progress("normal" if options.dry_run else console_mode(options), steps=settings.run.steps)
    plan = make_plan(
        settings,
        processes=processes,
        gpu_memory=parse_gpu_memory(options.gpu_memory),
        ranks_per_node=ranks_of_this_node(os.environ),
    )
    for line in plan.lines(settings):
        progress.note(line)
    for warning in plan.warnings():
        progress.warn(warning)
    from megatron_paint.training.inputs import check_inputs  # imports more: after the plan is printed

    inputs = check_inputs(settings, plan.shape, run_folder=not options.self_check)
    for line in inputs.summary():
        progress.note(line)
    return inputs


def _train(
    settings: Settings, options: argparse.Namespace, *, prints_plan: bool, inputs: "Inputs | None" = None
) -> int:
    from megatron_paint.runtime.stop import exit_status
    from megatron_paint.training.start import train

    mode = console_mode(options)
    finished = train(settings, mode=mode, self_check_only=options.self_check, prints_plan=prints_plan, inputs=inputs)
    return 0 if finished else exit_status()
