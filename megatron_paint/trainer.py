"""The training loop: problems in, a Hugging Face checkpoint out. Every rank runs it; rank 0 writes and speaks."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_paint.config import Settings
from megatron_paint.errors import UserError
from megatron_paint.evaluate.requested import Requested
from megatron_paint.evaluation.evaluator import Answers, Evaluator
from megatron_paint.evaluation.grading import GradingPool
from megatron_paint.objectives import Objective, make_objective
from megatron_paint.overlap import MaskerPool
from megatron_paint.policy import Policy
from megatron_paint.problems import ProblemSet
from megatron_paint.prompts import Prompts
from megatron_paint.records import EvalReport, StepReport
from megatron_paint.run.folder import RunFolder
from megatron_paint.run.progress import Mode, Progress
from megatron_paint.run.report import ClipWatch, sample_lines
from megatron_paint.run.settings_file import plain
from megatron_paint.run.tensorboard_log import open_tensorboard
from megatron_paint.schedule import due_after, learning_rate
from megatron_paint.self_check import self_check
from megatron_paint.share import Share

if TYPE_CHECKING:
    from megatron_paint.mcore.world import World

MOST_MASKER_WORKERS = 8  # ours: a step of 512 problems is then measured in a tenth of a second


def train(settings: Settings, *, mode: Mode = "normal", self_check_only: bool = False) -> None:
    """Runs a whole training run in the world that the environment describes; UserError for bad input."""
    with _world(settings) as world, ExitStack() as stack:
        if self_check_only:
            check_model(settings, world, mode=mode)
        else:
            run = prepare(settings, world, mode=mode, stack=stack)
            self_check(settings, run.policy, run.problems, run.prompts, run.progress)
            run.train()


@contextmanager
def _world(settings: Settings) -> Iterator["World"]:
    """The ranks' groups; after an error they stay up unless this rank is alone: one that died would be waited for."""
    from megatron_paint.mcore.world import start_world, stop_world

    world = start_world(settings.megatron)
    try:
        yield world
    except BaseException:
        if world.size == 1:
            stop_world()
        raise
    stop_world()


def check_model(settings: Settings, world: "World", *, mode: Mode) -> None:
    """The self-check alone, without a run folder."""
    from megatron_paint.mcore.agree import first_rank_does
    from megatron_paint.mcore.policy import MegatronPolicy
    from megatron_paint.plan import make_plan
    from megatron_paint.sources import load_sources

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
    from megatron_paint.evaluate import command
    from megatron_paint.plan import make_plan

    with _world(asked.settings) as world:
        command.evaluate(asked, world, make_plan(asked.settings, processes=world.size).shape, mode=mode)


def _benchmark(settings: Settings) -> str:
    return Path(str(settings.evaluation.problems)).stem


def prepare(settings: Settings, world: "World", *, mode: Mode, stack: ExitStack) -> "Run":
    """Everything that the loop needs: data checked, the folder ready, the model loaded, the checkpoint taken up."""
    from megatron_paint.mcore.agree import first_rank_does
    from megatron_paint.mcore.policy import MegatronPolicy
    from megatron_paint.plan import make_plan
    from megatron_paint.sources import load_sources

    on_first_rank = partial(first_rank_does, world)
    plan = make_plan(settings, processes=world.size)
    sources = load_sources(settings, plan.shape, share=on_first_rank)
    folder = RunFolder(settings.run.dir)
    start = on_first_rank(lambda: folder.prepare(settings))
    first = world.rank == 0
    board, note = None, ""
    if first and settings.run.tensorboard:
        board, note = open_tensorboard(folder.path / "tensorboard", resume_step=start)
    progress = Progress(mode if first else "silent", steps=settings.run.steps, tensorboard=board)
    for line in [*plan.lines(settings), *sources.notes, *([note] if note else [])]:
        progress.note(line)
    policy = MegatronPolicy(settings, plan.shape, world)
    if start:
        _take_up(policy, folder.checkpoint_folder(start), start)
        progress.note(f"resumed at step {start} from {folder.checkpoint_folder(start)}")
    evaluator = None
    if sources.held_out:
        evaluator = Evaluator(settings.evaluation, sources.held_out, sources.prompts, seed=settings.run.seed)
    graders = stack.enter_context(GradingPool(seconds=settings.evaluation.grading_seconds)) if first else None
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
    )


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

    def train(self) -> None:
        """All steps that are left, each followed by what is due after it; the last one by everything, and a table."""
        run, clip_watch = self.settings.run, ClipWatch()
        self.do_what_is_due(self.start)
        self.progress.start_clock()
        for step in range(self.start + 1, run.steps + 1):
            lr = learning_rate(step, steps=run.steps, settings=self.settings.optimizer)
            report = self.step(step, lr)
            self.on_first_rank(lambda report=report: self.record(report, clip_watch))
            self.do_what_is_due(step)
        self.on_first_rank(self.end)

    def do_what_is_due(self, step: int) -> None:
        """Checkpoint, export and evaluation, where they are due; at the step that the run goes on from only what its
        earlier life has not done. What stands beyond that step is done anew."""
        does = {"checkpoint": self.save, "export": self.export, "evaluation": self.evaluate}
        for task in due_after(step, self.settings.run):
            done = step == self.start and self.on_first_rank(lambda task=task: self.folder.holds(task, step))
            if not done:
                does[task](step)

    def step(self, step: int, lr: float) -> StepReport:
        """One step; a loss or gradient that is not finite ends the run before a weight is touched."""
        try:
            return self.objective.step(self.policy, self.problems.batch(step), step=step, lr=lr)
        except FloatingPointError as error:
            raise UserError(
                f"step {step} stopped before the optimiser: {error}. What is in "
                f"{self.folder.path} is whole; a lower optimizer.lr or optimizer.clip_grad is the usual cure"
            ) from error

    def record(self, report: StepReport, clip_watch: ClipWatch) -> None:
        """Writes the step's metrics and samples and says its line; the work of one rank."""
        self.folder.append_metrics(report.metrics)
        self.folder.write_samples(report.step, sample_lines(report, decode=self.prompts.response_text))
        self.progress.step(report)
        if self.settings.objective.loss.clips_entries and (warning := clip_watch.update(report.metrics)):
            self.progress.warn(warning)

    def save(self, step: int) -> None:
        """A checkpoint from which a run goes on at any layout."""
        self.policy.save(self.folder.checkpoint_folder(step), {"step": step, "settings": plain(self.settings)})

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
