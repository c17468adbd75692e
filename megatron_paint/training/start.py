"""Starts a training run: ranks, data, run folder, model and checkpoint; then the loop.

Every rank runs it. Rank 0 writes and prints.
"""

import os
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_paint.base.errors import UserError
from megatron_paint.config.settings import Settings
from megatron_paint.evaluation.evaluator import Evaluator
from megatron_paint.grading.grade import GradingPool
from megatron_paint.launch.failure_notes import leave_note
from megatron_paint.masker.overlap import MaskerPool
from megatron_paint.objectives import make_objective
from megatron_paint.policy import Policy
from megatron_paint.run.console import Mode, Progress
from megatron_paint.run.folder import RunFolder
from megatron_paint.run.tensorboard import open_tensorboard
from megatron_paint.runtime.heartbeat import LONG, Heart, go_on, start_heart, stop_heart
from megatron_paint.runtime.stop import StopRequest, job_end
from megatron_paint.training.loop import Run
from megatron_paint.training.self_check import self_check

if TYPE_CHECKING:
    from megatron_paint.mcore.ranks import Ranks


MOST_MASKER_WORKERS = 8  # ours: a step of 512 problems is then measured in a tenth of a second


def train(
    settings: Settings, *, mode: Mode = "normal", self_check_only: bool = False, prints_plan: bool = True
) -> bool:
    """Runs a training run in the ranks that the environment describes; returns whether it came to its end.

    False: it was asked to stop, and has left a checkpoint. prints_plan: False where another process has printed plan
    and data. UserError for bad input.
    """
    from megatron_paint.mcore.ranks import joined_ranks

    with ExitStack() as stack:
        request = stack.enter_context(StopRequest(margin=settings.run.exit_before_limit_s))
        hang = None if self_check_only else settings.run.hang_timeout_s
        ranks = stack.enter_context(joined_ranks(settings.megatron, hang_seconds=hang and 2 * LONG * hang))
        if self_check_only:
            check_model(settings, ranks, mode=mode, prints_plan=prints_plan)
            return True
        run = prepare(settings, ranks, mode=mode, stack=stack, request=request, prints_plan=prints_plan)
        self_check(settings, run.policy, run.problems, run.prompts, run.progress)
        return run.train()


def check_model(settings: Settings, ranks: "Ranks", *, mode: Mode, prints_plan: bool) -> None:
    """The self-check alone, without a run folder."""
    from megatron_paint.mcore.collectives import rank_zero_does
    from megatron_paint.mcore.policy import MegatronPolicy
    from megatron_paint.planning.memory import make_plan
    from megatron_paint.training.inputs import load_sources

    plan = make_plan(settings, processes=ranks.size)
    sources = load_sources(settings, plan.shape, on_rank_zero=partial(rank_zero_does, ranks))
    progress = Progress(_answer_mode(mode) if ranks.rank == 0 else "silent", steps=0)
    for line in plan.lines(settings) if prints_plan and mode != "quiet" else []:
        progress.note(line)
    policy = MegatronPolicy(settings, plan.shape, ranks, trained=False)
    self_check(settings, policy, sources.problems, sources.prompts, progress)


def _answer_mode(mode: Mode) -> Mode:
    """A command that is asked one thing says it even if it is to be quiet."""
    return "normal" if mode == "quiet" else mode


def prepare(
    settings: Settings, ranks: "Ranks", *, mode: Mode, stack: ExitStack, request: StopRequest, prints_plan: bool = True
) -> "Run":
    """Everything that the loop needs: data checked, the folder ready, the model loaded, the checkpoint taken up."""
    from megatron_paint.mcore.collectives import any_rank_says, rank_zero_does
    from megatron_paint.mcore.policy import MegatronPolicy
    from megatron_paint.planning.memory import make_plan
    from megatron_paint.training.inputs import load_sources

    on_rank_zero = partial(rank_zero_does, ranks)
    plan = make_plan(settings, processes=ranks.size)
    sources = load_sources(settings, plan.shape, on_rank_zero=on_rank_zero)
    folder, first = RunFolder(settings.run.dir), ranks.rank == 0
    request.end_at = job_end() if first else None
    on_rank_zero(lambda: folder.check(settings))
    set_aside = set_damaged_aside(folder, ranks) if settings.run.resume != "never" else []
    start = on_rank_zero(lambda: folder.prepare(settings))
    watch_over(settings, folder, ranks, stack)
    board, note = None, ""
    if first and settings.run.tensorboard:
        board, note = open_tensorboard(folder.path / "tensorboard", resume_step=start)
    progress = Progress(mode if first else "silent", steps=settings.run.steps, tensorboard=board)
    planned = [*plan.lines(settings), *sources.notes] if prints_plan else []
    for line in [*planned, *([note] if note else [])]:
        progress.note(line)
    for warning in set_aside:
        progress.warn(warning)
    policy = MegatronPolicy(settings, plan.shape, ranks)
    if start:
        _take_up(policy, folder.checkpoint_folder(start), start)
        progress.note(f"resumed at step {start} from {folder.checkpoint_folder(start)}")
    evaluator = None
    if sources.held_out:
        evaluator = Evaluator(settings.evaluation, sources.held_out, sources.prompts, seed=settings.run.seed)
    seconds = settings.evaluation.grading_seconds
    graders = stack.enter_context(GradingPool(seconds=seconds, on_verdict=go_on)) if first else None
    pool = _masker_pool(stack) if first and settings.objective.distils else None
    return Run(
        settings=settings,
        folder=folder,
        policy=policy,
        problems=sources.problems,
        prompts=sources.prompts,
        objective=make_objective(settings, sources.prompts, pool=pool, graders=graders, on_rank_zero=on_rank_zero),
        evaluator=evaluator,
        graders=graders,
        progress=progress,
        start=start,
        on_rank_zero=on_rank_zero,
        asked_to_stop=lambda seconds: any_rank_says(ranks, request.reason(next_seconds=seconds)),
    )


def set_damaged_aside(folder: RunFolder, ranks: "Ranks") -> list[str]:
    """Renames the newest checkpoints whose files are not what was written, up to the first that is whole; warnings.

    UserError, and nothing is renamed: none is whole, or a disk cannot be read.
    """
    from megatron_paint.mcore.checkpoint import checkpoint_damage
    from megatron_paint.mcore.collectives import rank_zero_does

    damaged: list[tuple[int, str]] = []
    steps = rank_zero_does(ranks, folder.checkpoints)
    for step in reversed(steps):
        found = checkpoint_damage(folder.checkpoint_folder(step), ranks)
        if found is None:
            break
        damaged.append((step, f"checkpoint {folder.checkpoint_folder(step)} is damaged: {found}"))
    if damaged and len(damaged) == len(steps):
        raise UserError(
            f"{damaged[0][1]}, and no other is whole. Nothing was changed: see whether "
            f"every node shows {folder.path} whole, put a copy of a checkpoint back, or start anew in another run.dir"
        )
    names = [rank_zero_does(ranks, lambda step=step: folder.set_aside(step)).name for step, _ in damaged]
    return [f"{message}. It is {name} now" for (_, message), name in zip(damaged, names, strict=True)]


def watch_over(settings: Settings, folder: RunFolder, ranks: "Ranks", stack: ExitStack) -> None:
    """Starts this rank's heartbeat, which ends the process where the run hangs."""

    def give_up(message: str) -> None:
        if not leave_note(message, mistake=False):
            print(message, file=sys.stderr, flush=True)

    heart = Heart(
        folder.heartbeats, rank=ranks.rank, ranks=ranks.size, limit=settings.run.hang_timeout_s, give_up=give_up
    )
    start_heart(heart)
    stack.callback(stop_heart)


def _take_up(policy: Policy, checkpoint: Path, step: int) -> None:
    state = policy.load(checkpoint)
    if state.get("step") != step:
        raise UserError(
            f"checkpoint {checkpoint} is of step {state.get('step')}, as its run_state.json says: give it back the "
            "name that it was written under"
        )


def _masker_pool(stack: ExitStack) -> MaskerPool | None:
    """Worker processes for the masker where a core is free for them; they start when a step has much to measure."""
    workers = min(MOST_MASKER_WORKERS, (os.cpu_count() or 1) // 2)
    if workers < 2:
        return None
    pool = MaskerPool(workers)
    stack.callback(pool.close)
    return pool
