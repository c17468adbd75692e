"""Starts a training run: ranks, data, run folder, model and checkpoint; then the loop.

Every rank runs it. Rank 0 writes and prints.
"""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_paint.base.errors import UserError
from megatron_paint.config.settings import Settings
from megatron_paint.data.order import ProblemOrder, problem_order
from megatron_paint.evaluation.evaluator import Evaluator
from megatron_paint.grading.grade import Rules
from megatron_paint.grading.graders import Graders
from megatron_paint.launch.failure_notes import leave_failure_note
from megatron_paint.masker.overlap import MaskerPool
from megatron_paint.objectives import OBJECTIVES, ObjectiveInputs
from megatron_paint.planning.hardware import ranks_of_this_node
from megatron_paint.planning.local_model import with_local_model
from megatron_paint.planning.memory import make_plan
from megatron_paint.policy import Policy
from megatron_paint.run.console import Mode, Progress
from megatron_paint.run.console_log import ConsoleLog
from megatron_paint.run.folder import RunFolder
from megatron_paint.run.lock import RunLock
from megatron_paint.run.loggers.loggers import Loggers, open_loggers
from megatron_paint.runtime.heartbeat import LONG, Watchdog, mark_progress, start_watchdog, stop_watchdog
from megatron_paint.runtime.stop import StopRequest, job_end
from megatron_paint.training.engines import start_servers, training_rollouts, training_samplers
from megatron_paint.training.inputs import Inputs, load_inputs
from megatron_paint.training.loop import Run
from megatron_paint.training.ownership import OwnedRun, owned_run
from megatron_paint.training.profile_warnings import profile_warnings
from megatron_paint.training.profiler import StepProfiler
from megatron_paint.training.recorder import Recorder
from megatron_paint.training.self_check import report_fp8_noise, self_check
from megatron_paint.training.server_room import check_room_for_answers, check_room_for_rollouts

if TYPE_CHECKING:
    from megatron_paint.mcore.ranks import Ranks
    from megatron_paint.rollouts.vllm.fleet import Fleet


MOST_MASKER_WORKERS = 8  # ours: a step of 512 problems then takes a tenth of a second


def train(
    settings: Settings,
    *,
    mode: Mode = "normal",
    log_every: int = 1,
    self_check_only: bool = False,
    prints_plan: bool = True,
    inputs: Inputs | None = None,
    lock: RunLock | None = None,
    log: ConsoleLog | None = None,
    on_interrupt: Callable[[], None] = lambda: None,
) -> bool:
    """Runs a training run in the ranks that the environment describes.

    log_every: the console prints the line of every so many steps. prints_plan: False if another process has printed the
    plan and the size of the data. inputs: what `check_inputs` has read in this process, if it was called. lock, log:
    those of the run folder, if this process has opened them. on_interrupt: called at the first Ctrl-C. Returns False if
    the run was asked to stop; it has left a checkpoint then. Raises UserError for bad input.
    """
    from megatron_paint.mcore.ranks import joined_ranks

    settings = with_local_model(settings)
    with ExitStack() as stack:
        request = StopRequest(margin=settings.run.exit_before_limit_s, on_interrupt=on_interrupt)
        if not self_check_only:  # a self-check has nothing to save: signals end it
            stack.enter_context(request)
        hang = None if self_check_only else settings.run.hang_timeout_s
        ranks = stack.enter_context(joined_ranks(settings.megatron, hang_seconds=hang and 2 * LONG * hang))
        if self_check_only:
            run_self_check(settings, ranks, inputs, mode=mode, prints_plan=prints_plan)
            return True
        own = partial(owned_run, settings, ranks, lock=lock, log=log)
        run = prepare(
            settings,
            ranks,
            inputs,
            own,
            mode=mode,
            log_every=log_every,
            prints_plan=prints_plan,
            stack=stack,
            request=request,
        )
        run.sampler.sync_weights(run.start + 1)
        self_check(settings, run.policy, run.sampler, run.problems, run.recorder.prompts, run.progress)
        run.sampler.release_memory()
        return run.train()


def run_self_check(settings: Settings, ranks: "Ranks", inputs: Inputs | None, *, mode: Mode, prints_plan: bool) -> None:
    """The self-check alone, without a run folder."""
    from megatron_paint.mcore.collectives import rank_zero_does
    from megatron_paint.mcore.policy import MegatronPolicy

    plan = make_plan(settings, processes=ranks.size)
    inputs = inputs or load_inputs(settings, plan.shape, on_rank_zero=partial(rank_zero_does, ranks))
    # A command that is asked one question answers it, even under --quiet.
    progress = Progress(("normal" if mode == "quiet" else mode) if ranks.rank == 0 else "silent", steps=0)
    for line in plan.lines(settings) if prints_plan and mode != "quiet" else []:
        progress.note(line)
    with_fp8 = settings.megatron.fp8 is not None
    policy = MegatronPolicy(settings, plan.shape, ranks, trained=with_fp8)
    samples = self_check(settings, policy, policy.sampler, inputs.problems, inputs.prompts, progress)
    if with_fp8:
        report_fp8_noise(settings, policy, samples, progress)


def prepare(
    settings: Settings,
    ranks: "Ranks",
    inputs: Inputs | None,
    own: Callable[[], AbstractContextManager[OwnedRun]],
    *,
    mode: Mode,
    log_every: int,
    prints_plan: bool,
    stack: ExitStack,
    request: StopRequest,
) -> Run:
    """Builds everything that the loop needs: inputs, run folder, model, checkpoint, objective.

    own: takes the run folder for these ranks, before anything in it is read.
    """
    from megatron_paint.mcore.collectives import first_reason, rank_zero_does
    from megatron_paint.mcore.policy import MegatronPolicy

    on_rank_zero, first = partial(rank_zero_does, ranks), ranks.rank == 0
    plan = make_plan(settings, processes=ranks.size, ranks_per_node=ranks_of_this_node(os.environ))
    owned = stack.enter_context(own())
    folder = RunFolder(settings.run.dir)
    inputs = inputs or load_inputs(settings, plan.shape, on_rank_zero=on_rank_zero)
    request.end_at = job_end() if first else None
    on_rank_zero(lambda: folder.check(settings))
    warnings = [*owned.warnings, *(set_damaged_aside(folder, ranks) if settings.run.resume != "never" else [])]
    changed = on_rank_zero(lambda: _changes(folder, settings))
    start = on_rank_zero(lambda: folder.prepare(settings))
    watch_over(settings, folder, ranks, stack)
    progress = Progress(mode if first else "silent", steps=settings.run.steps, log=owned.log, log_every=log_every)
    stack.enter_context(progress.live())
    notes = [*plan.lines(settings), *inputs.notes] if prints_plan else []
    _print_start(progress, notes, [*([*plan.warnings(), *inputs.warnings] if prints_plan else []), *warnings])
    loggers = _open_loggers(settings, folder, progress, start=start, stack=stack) if first else Loggers()
    fleets: list[Fleet] = []  # one on rank 0, if the run has servers
    on_rank_zero(lambda: fleets.extend(start_servers(settings, plan.shape, note=progress.note, stack=stack)))
    policy = MegatronPolicy(settings, plan.shape, ranks)
    for note in policy.notes:
        progress.note(note)
    order = problem_order(settings.data, inputs.problems)
    state = _resume(policy, order, folder.checkpoint_folder(start), start, progress) if start else {}
    for change in changed:
        progress.result(change)
    graders = _graders(settings, inputs, stack) if first else None
    sampler, evaluation_sampler = training_samplers(
        settings, inputs.prompts, policy, ranks, next(iter(fleets), None), stack
    )
    evaluator = _evaluator(settings, inputs)
    on_rank_zero(lambda: _check_room(fleets, settings, inputs, evaluator))
    rollouts = training_rollouts(settings, inputs.prompts, sampler, upcoming=order.batch, policy=policy)
    for message in rollouts.load_state_dict(state.get("ahead", {}), order.batch(start + 1)):
        progress.warn(message)
    objective_inputs = ObjectiveInputs(
        settings=settings.objective,
        prompts=inputs.prompts,
        rollouts=rollouts,
        masker=_masker_pool(stack) if first and settings.needs.masker else None,
        grades_rollouts=settings.needs.graders,
        graders=graders,
        domains=settings.domains,
        on_rank_zero=on_rank_zero,
    )
    return Run(
        settings=settings,
        folder=folder,
        policy=policy,
        problems=inputs.problems,
        order=order,
        objective=OBJECTIVES[settings.objective.name](objective_inputs),
        rollouts=rollouts,
        sampler=evaluation_sampler,
        evaluator=evaluator,
        recorder=Recorder(
            settings=settings,
            folder=folder,
            progress=progress,
            prompts=inputs.prompts,
            graders=graders,
            loggers=loggers,
        ),
        progress=progress,
        start=start,
        on_rank_zero=on_rank_zero,
        stop_reason=lambda seconds: first_reason(ranks, request.reason(next_seconds=seconds)),
        confirm_owner=owned.confirm,
        profiled=_profiler(settings, folder, ranks, progress, owned.confirm, start=start, layers=plan.split.most),
    )


def _profiler(
    settings: Settings,
    folder: RunFolder,
    ranks: "Ranks",
    progress: Progress,
    confirm_owner: Callable[[], None],
    *,
    start: int,
    layers: int,
) -> Callable[[int], AbstractContextManager[None]]:
    """What profiles the steps of `run.profile`. layers: of the largest pipeline stage."""
    profile = settings.run.profile
    if profile is None:
        return lambda step: nullcontext()
    for warning in profile_warnings(settings, start=start, layers=layers):
        progress.warn(warning)
    return StepProfiler(settings=profile, folder=folder, ranks=ranks, progress=progress, confirm_owner=confirm_owner)


def _changes(folder: RunFolder, settings: Settings) -> list[str]:
    """A line for each setting that this start changes in the run, before the folder has it."""
    after = folder.latest_checkpoint() or 0
    return [
        f"changed after step {after}, as run.allow_changes lets it: {name}: {old!r} -> {new!r}"
        for name, (old, new) in folder.allowed_changes(settings).items()
    ]


def _print_start(progress: Progress, lines: Sequence[str], warnings: Sequence[str]) -> None:
    for line in lines:
        progress.note(line)
    for warning in warnings:
        progress.warn(warning)


def _open_loggers(
    settings: Settings, folder: RunFolder, progress: Progress, *, start: int, stack: ExitStack
) -> Loggers:
    """The loggers of rank 0. A run that does not close them itself was stopped, or has failed."""
    loggers = open_loggers(settings, folder, start=start, note=progress.note, warn=progress.warn)
    stack.push(lambda kind, *_: loggers.close("stopped" if kind is None else "failed"))
    return loggers


def set_damaged_aside(folder: RunFolder, ranks: "Ranks") -> list[str]:
    """Renames the newest checkpoints that are damaged, down to the first one that is complete. Returns the warnings.

    Raises UserError, and renames nothing, if no checkpoint is complete or a disk cannot be read.
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
            f"{damaged[0][1]}, and no other checkpoint is complete. Nothing was changed: check that every node sees "
            f"all files of {folder.path}, restore a copy of a checkpoint, or start again in another run.dir"
        )
    names = [rank_zero_does(ranks, lambda step=step: folder.set_aside(step)).name for step, _ in damaged]
    return [f"{message}. It is {name} now" for (_, message), name in zip(damaged, names, strict=True)]


def watch_over(settings: Settings, folder: RunFolder, ranks: "Ranks", stack: ExitStack) -> None:
    """Starts this rank's heartbeat. It ends the process if the run hangs."""

    def give_up(message: str) -> None:
        if not leave_failure_note(message, mistake=False):
            print(message, file=sys.stderr, flush=True)

    watchdog = Watchdog(
        folder.heartbeats, rank=ranks.rank, ranks=ranks.size, limit=settings.run.hang_timeout_s, give_up=give_up
    )
    start_watchdog(watchdog)
    stack.callback(stop_watchdog)


def _resume(policy: Policy, order: ProblemOrder, checkpoint: Path, step: int, progress: Progress) -> Mapping[str, Any]:
    """Continues from a checkpoint, and returns its state. UserError: it cannot be read or is of another step."""
    state = policy.load(checkpoint)
    if state.get("step") != step:
        raise UserError(
            f"checkpoint {checkpoint} is of step {state.get('step')}, as its run_state.json shows: rename it to the "
            "name that it was written under"
        )
    progress.note(f"resumed at step {step} from {checkpoint}")
    for message in order.load_state_dict(state.get("order", {})):
        progress.warn(message)
    return state


def _graders(settings: Settings, inputs: Inputs, stack: ExitStack) -> Graders | None:
    """Worker processes that grade, if rollouts or the answers of an evaluation get verdicts."""
    if not inputs.held_out and not settings.needs.graders:
        return None
    rules = Rules(box_in_thought=settings.grading.box_in_thought)
    seconds = inputs.evaluation.grading_seconds
    return stack.enter_context(Graders(settings.domains, seconds=seconds, rules=rules, on_verdict=mark_progress))


def _check_room(fleets: Sequence["Fleet"], settings: Settings, inputs: Inputs, evaluator: Evaluator | None) -> None:
    """UserError: a server of the run has no room for one of its prompts and the response."""
    for fleet in fleets:
        most_new = settings.rollout.max_new_tokens
        check_room_for_rollouts(fleet, inputs.problems.problems, inputs.prompts, most_new=most_new)
        if evaluator is not None:
            check_room_for_answers(fleet, evaluator)


def _evaluator(settings: Settings, inputs: Inputs) -> Evaluator | None:
    if not inputs.held_out:
        return None
    return Evaluator(inputs.evaluation, inputs.held_out, inputs.prompts, seed=settings.run.seed)


def _masker_pool(stack: ExitStack) -> MaskerPool | None:
    """Worker processes for the masker, if cores are free. They start when a step has much to measure."""
    workers = min(MOST_MASKER_WORKERS, (os.cpu_count() or 1) // 2)
    if workers < 2:
        return None
    pool = MaskerPool(workers)
    stack.callback(pool.close)
    return pool
