"""`megatron-paint train`: checks the settings before Megatron is imported, then trains here or starts the ranks."""

import argparse

from megatron_paint.cli.ranks import console_mode, number_of_ranks, place_among_ranks
from megatron_paint.config.load import load_settings


def run(options: argparse.Namespace, arguments: list[str]) -> int:
    """Trains, or only checks; returns the exit status. Without a rank environment, it starts the ranks."""
    from megatron_paint.planning.memory import make_plan

    place = place_among_ranks(options)
    settings = load_settings(options.config, options.overrides)
    processes = number_of_ranks(settings.megatron, options, place)
    plan = make_plan(settings, processes=processes)
    if place is None or (options.dry_run and place.rank == 0):
        from megatron_paint.training.inputs import check_sources

        # One process finds a mistake within seconds.
        notes = check_sources(settings, plan.shape, run_folder=not options.self_check)
        if options.dry_run:
            print("\n".join([*plan.lines(settings), *notes]))
    if options.dry_run:
        return 0
    if place is None and processes > 1:
        from megatron_paint.launch.local import run_here

        return run_here(arguments, processes)
    from megatron_paint.runtime.stop import exit_status
    from megatron_paint.training.start import train

    finished = train(settings, mode=console_mode(options), self_check_only=options.self_check)
    return 0 if finished else exit_status()
