"""`megatron-paint train`: checks the settings before Megatron is imported, then trains here or starts the ranks."""

import argparse
from functools import partial

from megatron_paint.cli.ranks import console_mode, number_of_ranks, rank_environment_of
from megatron_paint.config.load import load_settings


def run(options: argparse.Namespace, arguments: list[str]) -> int:
    """Trains, or only checks; returns the exit status. Without a rank environment, it starts the ranks."""
    from megatron_paint.planning.memory import make_plan

    environment = rank_environment_of(options)
    settings = load_settings(options.config, options.overrides)
    processes = number_of_ranks(settings.megatron, options, environment)
    plan = make_plan(settings, processes=processes)
    inputs = None
    if environment is None or (options.dry_run and environment.rank == 0):
        from megatron_paint.training.inputs import check_inputs

        # One process finds a mistake within seconds.
        inputs = check_inputs(settings, plan.shape, run_folder=not options.self_check)
        if options.dry_run:
            print("\n".join([*plan.lines(settings), *inputs.summary()]))
    if options.dry_run:
        return 0
    if environment is None and processes > 1:
        from megatron_paint.launch.local import run_here
        from megatron_paint.training.inputs import save_checked_problems

        return run_here(arguments, processes, prepare=partial(save_checked_problems, inputs))
    from megatron_paint.runtime.stop import exit_status
    from megatron_paint.training.start import train

    finished = train(settings, mode=console_mode(options), self_check_only=options.self_check, inputs=inputs)
    return 0 if finished else exit_status()
