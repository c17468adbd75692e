"""`megatron-paint evaluate`: a model on benchmarks, or recorded responses."""

import argparse
import os

from megatron_paint.cli.evaluate_options import requested
from megatron_paint.cli.ranks import console_mode, number_of_ranks, rank_environment_of, start_ranks_here
from megatron_paint.launch.loopback import loopback
from megatron_paint.planning.layout import check_layout


def run(options: argparse.Namespace, arguments: list[str]) -> int:
    """Evaluates a model, or grades recorded responses (`--responses`). Returns the exit status.

    Without a rank environment, it starts the ranks: `--processes`, or one for each GPU, or those of one replica.
    """
    if options.responses is not None:
        from megatron_paint.cli import grade_responses

        return grade_responses.run(options)
    environment = rank_environment_of(options)
    asked = requested(
        config=options.config,
        model=options.model,
        base=options.base,
        benchmarks=options.benchmarks,
        samples=options.samples,
        engine=options.engine,
        out=options.out,
        overrides=options.overrides,
    )
    settings = asked.settings
    if settings.rollout.engine == "vllm" and environment is None and options.processes is None:
        options.processes = 1  # the servers have the GPUs
    processes = number_of_ranks(settings.megatron, options, environment)
    layout = check_layout(settings.model, settings.megatron, settings.rollout, processes=processes)
    from megatron_paint.cli.evaluate_model import answer_file, evaluate, load_evaluators  # they import torch
    from megatron_paint.training.inputs import check_start

    if environment is None:
        check_start(settings.model, layout.shape)
        for name, evaluator in load_evaluators(asked, layout.shape):  # one process finds a mistake within seconds
            answer_file(asked, name, evaluator, layout.shape).begin()
        kept = f"the answers so far are kept in {asked.out}, and the same command continues"
        if processes > 1:
            from megatron_paint.run.console import Progress

            progress = Progress(console_mode(options), steps=0)
            return start_ranks_here(arguments, processes, progress, kept=lambda: kept)
        try:
            with loopback(os.environ):
                evaluate(asked, mode=console_mode(options))
        except KeyboardInterrupt:
            raise KeyboardInterrupt(kept) from None
    else:
        evaluate(asked, mode=console_mode(options))
    return 0
