"""`megatron-paint train`: checks the settings before torch is imported, then trains here or starts the ranks.

Imports are in the functions that need them: a mistake in the settings waits for none of them.
"""

import argparse
import os

from megatron_paint.cli.ranks import console_mode, number_of_ranks, place_among_ranks, start_ranks_here
from megatron_paint.config.load import load_settings
from megatron_paint.config.settings import Settings
from megatron_paint.planning.layout import check_model
from megatron_paint.runtime.processes import has_launcher


def run(options: argparse.Namespace, arguments: list[str]) -> int:
    """Trains, or only checks; returns the exit status. Without a rank environment, it starts the ranks."""
    place = place_among_ranks(options)
    settings = load_settings(options.config, options.overrides)
    check_model(settings.model, settings.megatron, settings.rollout)
    trains = not options.dry_run and not options.self_check
    if place is None and trains and _printed_results(settings, options):
        return 0
    processes = number_of_ranks(settings.megatron, options, place)
    if place is None or (options.dry_run and place.rank == 0):
        _check_and_print_plan(settings, options, processes)
    if options.dry_run:
        return 0
    if place is not None:
        return _train(settings, options, prints_plan=not has_launcher())
    if processes > 1:
        return start_ranks_here(arguments, processes, options)
    from megatron_paint.launch.loopback import loopback

    with loopback(os.environ):
        return _train(settings, options, prints_plan=False)


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


def _check_and_print_plan(settings: Settings, options: argparse.Namespace, processes: int) -> None:
    """Prints the plan, then checks the data and prints its size. One process finds a mistake within seconds."""
    from megatron_paint.planning.memory import make_plan
    from megatron_paint.run.console import Progress

    progress = Progress("normal" if options.dry_run else console_mode(options), steps=settings.run.steps)
    plan = make_plan(settings, processes=processes)
    for line in plan.lines(settings):
        progress.note(line)
    from megatron_paint.training.inputs import check_sources  # imports more: after the plan is printed

    for line in check_sources(settings, plan.shape, run_folder=not options.self_check):
        progress.note(line)


def _train(settings: Settings, options: argparse.Namespace, *, prints_plan: bool) -> int:
    from megatron_paint.runtime.stop import exit_status
    from megatron_paint.training.start import train

    mode = console_mode(options)
    finished = train(settings, mode=mode, self_check_only=options.self_check, prints_plan=prints_plan)
    return 0 if finished else exit_status()
