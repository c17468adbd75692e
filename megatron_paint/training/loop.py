"""The training loop: problems in, a Hugging Face checkpoint out. Every rank runs it; rank 0 writes and speaks."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_paint.base.errors import UserError
from megatron_paint.cli.evaluate_options import Requested
from megatron_paint.config.saved import plain
from megatron_paint.config.schedule import due_after, learning_rate, outlived
from megatron_paint.config.settings import Settings
from megatron_paint.data.problems import ProblemSet
from megatron_paint.data.prompts import Prompts
from megatron_paint.evaluation.evaluator import Answers, Evaluator
from megatron_paint.grading.grade import GradingPool
from megatron_paint.launch.failure_notes import leave_note
from megatron_paint.masker.overlap import MaskerPool
from megatron_paint.objectives import Objective, make_objective
from megatron_paint.objectives.metrics import ClipWatch, sample_lines
from megatron_paint.policy import Policy
from megatron_paint.records import EvalReport, StepReport
from megatron_paint.run.console import Mode, Progress
from megatron_paint.run.folder import RunFolder
from megatron_paint.run.tensorboard import open_tensorboard
from megatron_paint.runtime.heartbeat import LONG, Heart, beat, go_on, start_heart, stop_heart
from megatron_paint.runtime.pace import Pace
from megatron_paint.runtime.rank_zero import Share
from megatron_paint.runtime.stop import StopRequest, job_end
from megatron_paint.training.self_check import self_check

if TYPE_CHECKING:
    from megatron_paint.mcore.ranks import World

MOST_MASKER_WORKERS = 8  # ours: a step of 512 problems is then measured in a tenth of a second


def train(settings: Settings, *, mode: Mode = "normal", self_check_only: bool = False) -> bool:
    """Runs a training run in the world that the environment describes; whether it came to its end.

    False: it was asked to stop, and has left a checkpoint. UserError for bad input.
    """
    with ExitStack() as stack:
        request = stack.enter_context(StopRequest(margin=settings.run.exit_before_limit_s))
        hang = None if self_check_only else settings.run.hang_timeout_s
        world = stack.enter_context(_world(settings, hang_seconds=None if hang is None else 2 * LONG * hang))
        if self_check_only:
            check_model(settings, world, mode=mode)
            return True
        run = prepare(settings, world, mode=mode, stack=stack, request=request)
        self_check(settings, run.policy, run.problems, run.prompts, run.progress)
        return run.train()


@contextmanager
def _world(settings: Settings, *, hang_seconds: float | None = None) -> Iterator["World"]:
    """The ranks' groups; after an error they stay up unless this rank is alone: one that died would be waited for."""
    from megatron_paint.mcore.ranks import start_world, stop_world

    world = start_world(settings.megatron, hang_seconds=hang_seconds)
    try:
        yield world
    except BaseException:
        if world.size == 1:
            stop_world()
        raise
    stop_world()


def check_model(settings: Settings, world: "World", *, mode: Mode) -> None:
    """The self-check alone, without a run folder."""
    from megatron_paint.mcore.collectives import first_rank_does
    from megatron_paint.mcore.policy import MegatronPolicy
    from megatron_paint.planning.memory import make_plan
    from megatron_paint.training.inputs import load_sources

    plan = make_plan(settings, processes=world.size)
    sources = load_sources(settings, plan.shape, share=partial(first_rank_does, world))
    progress = Progress(_answer_mode(mode) if world.rank == 0 else "silent", steps=0)
    for line in [] if mode == "quiet" else plan.lines(settings):
        progress.note(line)
    policy = MegatronPolicy(settings, plan.shape, world, trained=False)
    self_check(settings, policy, sources.problems, sources.prompts, progress)


def _answer_mode(mode: Mode) -> Mode:
    """A command that is asked one thing says it even if it is to be quiet."""
    return "normal" if mode == "quiet" else mode


def evaluate(asked: Requested, *, mode: Mode = "normal") -> None:
    """Evaluates a model without a run folder, in the world that the environment describes."""
    from megatron_paint.cli.main import evaluate as command
    from megatron_paint.planning.memory import make_plan

    with _world(asked.settings) as world:
        command.evaluate(asked, world, make_plan(asked.settings, processes=world.size).shape, mode=mode)


def _benchmark(settings: Settings) -> str:
    return Path(str(settings.evaluation.problems)).stem


def prepare(settings: Settings, world: "World", *, mode: Mode, stack: ExitStack, request: StopRequest) -> "Run":
    """Everything that the loop needs: data checked, the folder ready, the model loaded, the checkpoint taken up."""
    from megatron_paint.mcore.collectives import any_rank_says, first_rank_does
    from megatron_paint.mcore.policy import MegatronPolicy
    from megatron_paint.planning.memory import make_plan
    from megatron_paint.training.inputs import load_sources

    on_first_rank = partial(first_rank_does, world)
    plan = make_plan(settings, processes=world.size)
    sources = load_sources(settings, plan.shape, share=on_first_rank)
    folder, first = RunFolder(settings.run.dir), world.rank == 0
    request.end_at = job_end() if first else None
    on_first_rank(lambda: folder.check(settings))
    set_aside = set_damaged_aside(folder, world) if settings.run.resume != "never" else []
    start = on_first_rank(lambda: folder.prepare(settings))
    watch_over(settings, folder, world, stack)
    board, note = None, ""
    if first and settings.run.tensorboard:
        board, note = open_tensorboard(folder.path / "tensorboard", resume_step=start)
    progress = Progress(mode if first else "silent", steps=settings.run.steps, tensorboard=board)
    for line in [*plan.lines(settings), *sources.notes, *([note] if note else [])]:
        progress.note(line)
    for warning in set_aside:
        progress.warn(warning)
    policy = MegatronPolicy(settings, plan.shape, world)
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
        objective=make_objective(settings, sources.prompts, pool=pool, graders=graders, share=on_first_rank),
        evaluator=evaluator,
        graders=graders,
        progress=progress,
        start=start,
        on_first_rank=on_first_rank,
        asked_to_stop=lambda seconds: any_rank_says(world, request.reason(next_seconds=seconds)),
    )


def set_damaged_aside(folder: RunFolder, world: "World") -> list[str]:
    """Renames the newest checkpoints whose files are not what was written, up to the first that is whole; warnings.

    UserError, and nothing is renamed: none is whole, or a disk cannot be read.
    """
    from megatron_paint.mcore.checkpoint import checkpoint_damage
    from megatron_paint.mcore.collectives import first_rank_does

    damaged: list[tuple[int, str]] = []
    steps = first_rank_does(world, folder.checkpoints)
    for step in reversed(steps):
        found = checkpoint_damage(folder.checkpoint_folder(step), world)
        if found is None:
            break
        damaged.append((step, f"checkpoint {folder.checkpoint_folder(step)} is damaged: {found}"))
    if damaged and len(damaged) == len(steps):
        raise UserError(
            f"{damaged[0][1]}, and no other is whole. Nothing was changed: see whether "
            f"every node shows {folder.path} whole, put a copy of a checkpoint back, or start anew in another run.dir"
        )
    names = [first_rank_does(world, lambda step=step: folder.set_aside(step)).name for step, _ in damaged]
    return [f"{message}. It is {name} now" for (_, message), name in zip(damaged, names, strict=True)]


def watch_over(settings: Settings, folder: RunFolder, world: "World", stack: ExitStack) -> None:
    """Starts this rank's heartbeat, which ends the process where the run hangs."""

    def give_up(message: str) -> None:
        if not leave_note(message, mistake=False):
            print(message, file=sys.stderr, flush=True)

    heart = Heart(
        folder.heartbeats, rank=world.rank, ranks=world.size, limit=settings.run.hang_timeout_s, give_up=give_up
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


@dataclass(frozen=True, kw_only=True)
class Run:
    """A training run with everything loaded."""

    settings: Settings
    folder: RunFolder
    policy: Policy
    problems: ProblemSet
    prompts: Prompts
    objective: Objective
    evaluator: Evaluator | None
    graders: GradingPool | None  # on the rank that grades
    progress: Progress
    start: int  # last step done
    on_first_rank: Share
    # Why to stop, on all ranks together; given the seconds until it is asked again.
    asked_to_stop: Callable[[float], str | None] = lambda seconds: None
    pace: Pace = field(default_factory=Pace)

    def train(self) -> bool:
        """All steps that are left, each followed by what is due after it; the last one by everything, and a table.

        False where it was asked to stop before its end, which it does between two steps, with a checkpoint.
        """
        try:
            return self.do_all_steps()
        except UserError as error:  # what was being saved is worth having
            self.rescue_save(error)
            raise

    def do_all_steps(self) -> bool:
        """The loop, which leaves a save that goes on behind it where it ends by an error."""
        run, clip_watch = self.settings.run, ClipWatch()
        if self.stops_after(self.start, ["evaluation"]):
            return False
        self.do_what_is_due(self.start)
        if self.stops_after(self.start, ["step"]):
            return False
        self.progress.start_clock()
        for step in range(self.start + 1, run.steps + 1):
            with self.pace.timed("step"):
                self.step(step, clip_watch)
            self.finish_save(wait=False)
            due = due_after(step, run)
            if self.stops_after(step, due or ["step"]):
                return False
            if due:
                self.do_what_is_due(step)
                if self.stops_after(step, ["step"]):
                    return False
        beat("checkpoint")
        self.finish_save()
        self.on_first_rank(self.end)
        return True

    def step(self, step: int, clip_watch: ClipWatch) -> None:
        """One step of the objective, recorded; or counted where its loss or gradient is not finite."""
        beat("rollout", step)
        lr = learning_rate(step, steps=self.settings.run.steps, settings=self.settings.optimizer)
        try:
            report = self.objective.step(self.policy, self.problems.batch(step), step=step, lr=lr)
            self.on_first_rank(lambda: self.record(report, clip_watch))
        except FloatingPointError as error:
            self.on_first_rank(lambda error=error: self.leave_out(step, error))

    def stops_after(self, step: int, coming: Sequence[str]) -> bool:
        """Whether the run ends here because it was asked to; its checkpoint stands then, if a step was done.

        coming: what is done until this is asked again, for which there may be no time.
        """
        if step == self.settings.run.steps:
            return False
        if (reason := self.asked_to_stop(self.pace.expected(coming))) is None:
            return False
        if step == 0:
            self.progress.result(
                f"Stopped before the first step by {reason}; the same command with run.resume=auto begins it",
                step=step,
                reason=reason,
            )
            return True
        beat("checkpoint", step)
        self.finish_save()
        if not self.on_first_rank(lambda: self.folder.holds("checkpoint", step)):
            self.save(step)
            self.finish_save()
        self.progress.result(
            f"Stopped after step {step} by {reason}; the same command with run.resume=auto goes on from "
            f"{self.folder.checkpoint_folder(step)}",
            step=step,
            reason=reason,
        )
        return True

    def leave_out(self, step: int, error: FloatingPointError) -> None:
        """Counts a step whose loss or gradient is not finite, before which no weight was touched; the work of one rank.

        UserError: more of them than run.max_skipped_steps.
        """
        before = sum("skipped" in line for line in self.folder.read_metrics())
        allowed = self.settings.run.max_skipped_steps
        if before >= allowed:
            counted = f"; {before} steps were left out before, all that run.max_skipped_steps allows" if allowed else ""
            raise UserError(
                f"step {step} stopped before the optimiser: {error}{counted}. What is in "
                f"{self.folder.path} is whole; a lower optimizer.lr or optimizer.clip_grad is the usual cure"
            ) from error
        self.folder.append_metrics({"step": step, "skipped": str(error)})
        self.progress.warn(f"step {step} is left out ({before + 1} of at most {allowed}): {error}")

    def do_what_is_due(self, step: int) -> None:
        """Checkpoint, export and evaluation, where they are due; at the step that the run goes on from only what its
        earlier life has not done. What stands beyond that step is done anew."""
        does = {"checkpoint": self.save, "export": self.export, "evaluation": self.evaluate}
        for task in due_after(step, self.settings.run):
            done = step == self.start and self.on_first_rank(lambda task=task: self.folder.holds(task, step))
            if not done:
                beat(task, step)
                with self.pace.timed(task):
                    does[task](step)

    def record(self, report: StepReport, clip_watch: ClipWatch) -> None:
        """Writes the step's metrics and samples and says its line; the work of one rank."""
        self.folder.append_metrics(report.metrics)
        self.folder.write_samples(report.step, sample_lines(report, decode=self.prompts.response_text))
        self.progress.step(report)
        if self.settings.objective.loss.clips_entries and (warning := clip_watch.update(report.metrics)):
            self.progress.warn(warning)

    def save(self, step: int) -> None:
        """A checkpoint from which a run goes on at any layout, written as training goes on with `run.async_save`."""
        self.finish_save()  # of the checkpoint before
        self.pace.begin("write")
        self.policy.save(self.folder.checkpoint_folder(step), {"step": step, "settings": plain(self.settings)})
        if not self.settings.run.async_save:
            self.finish_save()

    def finish_save(self, *, wait: bool = True) -> None:
        """Once the checkpoint that was begun stands, removes those that it outlives."""
        if self.policy.finish_save(wait=wait):
            self.pace.end("write")
            self.on_first_rank(
                lambda: self.folder.remove_checkpoints(outlived(self.folder.checkpoints(), self.settings.run))
            )

    def rescue_save(self, error: UserError) -> None:
        """Waits for the save that goes on while a run ends by an error; UserError: it met one, too.

        The error may be this rank's alone, so that this asks no other rank anything.
        """
        beat("checkpoint")
        try:
            self.policy.finish_save(wait=True)
        except UserError as another:
            raise UserError(f"{error}. And the checkpoint that was being written is not whole: {another}") from error

    def export(self, step: int) -> None:
        """A Hugging Face checkpoint."""
        self.policy.export(self.folder.hf_folder(step))

    def evaluate(self, step: int) -> None:
        """Evaluates the current weights if there is a held-out file."""
        if self.evaluator is not None:
            answers = self.evaluator.sample(self.policy)
            self.on_first_rank(lambda: self.grade(answers, step))

    def grade(self, answers: Answers, step: int) -> None:
        """Grades, writes and says an evaluation; the work of one rank."""
        benchmark = _benchmark(self.settings)
        report = self.evaluator.report(answers, step=step, benchmark=benchmark, graders=self.graders)
        self.folder.write_eval(report)
        self.progress.evaluation(report)

    def end(self) -> None:
        """Says where to look next and how the model did before and after, as the run folder has it."""
        last = self.settings.run.steps
        self.progress.note(
            f"Look next: megatron-paint inspect samples {self.folder.path} {last}, "
            f"{self.folder.metrics_file}, {self.folder.hf_folder(last)} (a Hugging Face checkpoint)"
        )
        before, after = self.evaluation_of(0), self.evaluation_of(last)
        self.progress.end(before=before if after else [], after=after, folder=str(self.folder.path))

    def evaluation_of(self, step: int) -> list[EvalReport]:
        """The evaluation of a step that stands in the run folder, none if there is none."""
        return [self.folder.read_eval(step)] if self.folder.holds("evaluation", step) else []


def _masker_pool(stack: ExitStack) -> MaskerPool | None:
    """Worker processes for the masker where a core is free for them; they start when a step has much to measure."""
    workers = min(MOST_MASKER_WORKERS, (os.cpu_count() or 1) // 2)
    if workers < 2:
        return None
    pool = MaskerPool(workers)
    stack.callback(pool.close)
    return pool
