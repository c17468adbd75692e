"""`megatron-paint search`: checks settings and space, then runs trials until none is left, and reports."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_paint.base.counts import count_text
from megatron_paint.base.errors import UserError
from megatron_paint.cli.ranks import console_mode
from megatron_paint.cli.search_options import check_search_options
from megatron_paint.config.load import load_settings
from megatron_paint.launch.rank_environment import find_rank_environment
from megatron_paint.planning.layout import check_layout, fewest_processes
from megatron_paint.planning.local_model import with_local_model
from megatron_paint.search.folder import open_folder, read_folder
from megatron_paint.search.space import Space, read_space, search_tree
from megatron_paint.search.text import chosen_text

if TYPE_CHECKING:
    from megatron_paint.search.final import Problems
    from megatron_paint.search.study import SearchStudy
    from megatron_paint.search.trial_run import Place


def run(options: argparse.Namespace, _: list[str]) -> int:
    """Searches, or only prints the plan or the report. Returns the exit status.

    0: all trials have ended, or other workers run the rest; 75: asked to stop, the same command continues.
    """
    _check_options(options)
    settings = load_settings(options.config, options.overrides)
    space = read_space(options.space, settings)
    out = options.out or Path(f"{settings.run.dir}_search")
    from megatron_paint.search.final import load_problems
    from megatron_paint.search.study import import_optuna

    import_optuna()
    problems = load_problems(space)
    if options.report_only:
        read_folder(out, search_tree(space, seed=options.seed))
        return _report(_open_study(out, space, options), problems, options)
    found, gpus = _places(options, space)
    for line in (*_plan_lines(space, problems, out, options), *_place_lines(found, gpus)):
        print(line)
    from megatron_paint.search.checks import check_trials

    for line in check_trials(space, problems, processes=found[0].processes):  # a mistake is found before any trial
        print(line)
    if options.dry_run:
        return 0
    open_folder(out, search_tree(space, seed=options.seed))
    return _search(_open_study(out, space, options), problems, options, found)


def _check_options(options: argparse.Namespace) -> None:
    check_search_options(options)
    if find_rank_environment(os.environ) is not None:
        raise UserError(
            "search starts the ranks of its trials itself, but this process is one of several ranks of torchrun or "
            "srun: start one process a machine (srun --ntasks-per-node=1 with --nodes=1, or no launcher)"
        )


def _open_study(out: Path, space: Space, options: argparse.Namespace) -> "SearchStudy":
    from megatron_paint.search.study import SearchStudy

    return SearchStudy(out, space, seed=options.seed)


def _plan_lines(space: Space, problems: "Problems", out: Path, options: argparse.Namespace) -> list[str]:
    """What the search varies, on which problems, and the most that it can cost."""
    budget, default = space.settings.budget, space.default
    evaluations = len({*range(0, budget.steps, budget.evaluate_every), budget.steps})
    samples = space.settings.validation.samples or space.given.evaluation.samples
    greedy = int(space.given.evaluation.greedy)
    answers = evaluations * len(problems.validation.problems) * (samples + greedy)
    test = "none: evaluation.problems is null"
    if problems.test is not None:
        number = count_text(len(problems.test.problems), "problem")
        test = f"{number} of {space.given.evaluation.problems}, after the last trial"
    width = max(len(parameter.key) for parameter in space.parameters)
    return [
        f"search     {count_text(options.trials, 'trial')} in {out}, {options.jobs} side by side; seed {options.seed}",
        *(f"           {parameter.key:<{width}}  {parameter.text}" for parameter in space.parameters),
        *(f"           {key:<{width}}  not varied: its `when` does not hold" for key in space.unused),
        f"trial 0    the given settings: {chosen_text(default)}",
        f"validation {count_text(len(problems.validation.problems), 'problem')} of "
        f"{space.settings.validation.problems}, by which trials are chosen and pruned",
        f"test       {test}",
        f"cost       a trial: at most {count_text(budget.steps, 'step')} of "
        f"{count_text(space.given.data.problems_per_step, 'problem')} and {count_text(evaluations, 'evaluation')}, "
        f"{count_text(answers, 'answer')}",
        f"           all {options.trials}: at most {count_text(options.trials * budget.steps, 'step')} and "
        f"{count_text(options.trials * answers, 'answer')}; pruned trials cost less (pruner: "
        f"{space.settings.pruner.rule})",
    ]


def _place_lines(found: "list[Place]", gpus: list[str]) -> list[str]:
    """Where a trial trains."""
    each = len(found[0].gpus)
    left = gpus[each * len(found) :]
    where = f" on {count_text(each, 'GPU')}" if each else f" of {count_text(found[0].threads, 'thread')}"
    unused = f"; GPUs {', '.join(left)} stay unused, because all trials get equally many" if left else ""
    return [f"places     {len(found)}, each with {count_text(found[0].processes, 'rank')}{where}{unused}"]


def _search(study: "SearchStudy", problems: "Problems", options: argparse.Namespace, places: "list[Place]") -> int:
    from megatron_paint.run.console import Progress
    from megatron_paint.search.final import compare
    from megatron_paint.search.worker import Worker

    progress = Progress(console_mode(options), steps=0)
    worker = Worker(study, study.space, out=study.folder, most=options.trials, places=places, progress=progress)
    try:
        status = worker.work()
        trials = study.trials()
        if status == 0 and all(trial.is_ended for trial in trials):
            status = compare(study.folder, study.space, trials, place=places[0], progress=progress)
        elif status == 0:
            left = [str(trial.number) for trial in trials if not trial.is_ended]
            progress.note(f"other workers run trials {', '.join(left)}: nothing is left to take")
    finally:
        _report(study, problems, options)
    return status


def _places(options: argparse.Namespace, space: Space) -> "tuple[list[Place], list[str]]":
    """The places of trials on this machine, and its GPUs, which are divided among them. UserError: they do not fit."""
    import torch

    from megatron_paint.search.checks import check_places, trial_0
    from megatron_paint.search.trial_run import places

    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    gpus = visible.split(",") if count and visible else [str(number) for number in range(count)]
    given = with_local_model(trial_0(space))
    replica = fewest_processes(given.megatron)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found = places(jobs=options.jobs, processes=options.processes, gpus=gpus, cores=cores, ranks=replica)
    check_places(found, gpus=gpus, asked=options.processes)
    check_layout(given.model, given.megatron, given.rollout, processes=found[0].processes)
    return found, gpus


def _report(study: "SearchStudy", problems: "Problems", options: argparse.Namespace) -> int:
    """Writes the report of the trials so far and prints where it is."""
    from megatron_paint.run.console import Progress
    from megatron_paint.search.final import read_comparison
    from megatron_paint.search.report import BEST, build_report, write_report
    from megatron_paint.search.text import with_interval

    progress = Progress(console_mode(options), steps=0)
    with study.lock.held():  # of two workers, the one that writes last has seen more
        final = read_comparison(study.folder, study.space, study.trials())
        report = build_report(study.folder, study, seed=options.seed, final=final)
        write_report(study.folder, study.space, report, problems)
    if report.best is not None:
        best = report.best
        progress.result(f"best so far: trial {best.trial.number}, {with_interval(best.accuracy)} % on validation")
        progress.result(f"its settings: {study.folder / BEST}")
    if final is not None:
        progress.result(
            f"on other problems: best {with_interval(final.best_accuracy)} %, given "
            f"{with_interval(final.default_accuracy)} %; difference {with_interval(final.difference, sign=True)} points"
        )
    progress.result(f"report: {study.folder / 'report.md'}")
    return 0
