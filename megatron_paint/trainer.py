"""The training loop: problems in, a Hugging Face checkpoint out. Every rank runs it; rank 0 writes and speaks."""

import os
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_paint.config import Settings
from megatron_paint.errors import UserError
from megatron_paint.evaluation.evaluator import Evaluator
from megatron_paint.evaluation.grading import GradingPool
from megatron_paint.losses import InterpolationLossConfig
from megatron_paint.objectives import Paint, Sft, make_objective
from megatron_paint.objectives.losses import DistillationLoss
from megatron_paint.overlap import MaskerPool
from megatron_paint.policy import Policy
from megatron_paint.problems import ProblemSet
from megatron_paint.prompts import Prompts
from megatron_paint.records import EvalReport, Problem, Sample, StepReport
from megatron_paint.run.folder import RunFolder
from megatron_paint.run.progress import Mode, Progress
from megatron_paint.run.report import ClipWatch, sample_lines
from megatron_paint.run.tensorboard_log import open_tensorboard
from megatron_paint.run.writing import to_json, write_atomically
from megatron_paint.schedule import learning_rate

if TYPE_CHECKING:
    from megatron_paint.mcore.world import World

SELF_CHECK_PROBLEMS = 4  # ours: enough to see a wrong offset, too few to be noticed


def train(settings: Settings, *, mode: Mode = "normal", self_check_only: bool = False) -> None:
    """Runs a whole training run in the world that the environment describes; UserError for bad input."""
    from megatron_paint.mcore.world import start_world, stop_world

    world = start_world(settings.megatron)
    try:
        with ExitStack() as stack:
            run = prepare(settings, world, mode=mode, stack=stack)
            run.self_check()
            if not self_check_only:
                run.train()
    finally:
        stop_world()


def evaluate(settings: Settings, *, mode: Mode = "normal", out: Path | None = None) -> None:
    """Evaluates the model of `model.hf_path` on the held-out problems, without a run folder."""
    from megatron_paint.mcore.agree import first_rank_does
    from megatron_paint.mcore.policy import MegatronPolicy
    from megatron_paint.mcore.world import start_world, stop_world
    from megatron_paint.plan import make_plan
    from megatron_paint.sources import load_held_out_sources

    world = start_world(settings.megatron)
    try:
        shape = make_plan(settings, processes=world.size).shape
        prompts, held_out = load_held_out_sources(settings, shape, share=lambda act: first_rank_does(world, act))
        evaluator = Evaluator(settings.evaluation, held_out, prompts, seed=settings.run.seed)
        policy = MegatronPolicy(settings, shape, world, trained=False)
        with GradingPool(seconds=settings.evaluation.grading_seconds) as graders:
            report = evaluator.evaluate(
                policy, step=0, benchmark=_benchmark(settings), graders=graders if world.rank == 0 else None
            )
        if report is not None:
            if out is not None:
                write_atomically(out, to_json(asdict(report), indent=1) + "\n")
            Progress(mode, steps=0).end(after=[report], folder=str(out) if out else "")
    finally:
        stop_world()


def _benchmark(settings: Settings) -> str:
    return Path(str(settings.evaluation.problems)).stem


def prepare(settings: Settings, world: "World", *, mode: Mode, stack: ExitStack) -> "Run":
    """Everything that the loop needs: data checked, the folder ready, the model loaded, the checkpoint taken up."""
    from megatron_paint.mcore.agree import first_rank_does
    from megatron_paint.mcore.policy import MegatronPolicy
    from megatron_paint.plan import make_plan
    from megatron_paint.sources import load_sources

    plan = make_plan(settings, processes=world.size)
    sources = load_sources(settings, plan.shape, share=lambda act: first_rank_does(world, act))
    folder = RunFolder(settings.run.dir)
    start = first_rank_does(world, lambda: folder.prepare(settings))
    first = world.rank == 0
    board, note = None, ""
    if first and settings.run.tensorboard:
        board, note = open_tensorboard(folder.path / "tensorboard", resume_step=start)
    progress = Progress(mode if first else "silent", steps=settings.run.steps, tensorboard=board)
    for line in [*plan.lines(settings), *sources.notes, *([note] if note else [])]:
        progress.note(line)
    policy = MegatronPolicy(settings, plan.shape, world)
    if start:
        policy.load(folder.checkpoint_folder(start))
        progress.note(f"resumed at step {start} from {folder.checkpoint_folder(start)}")
    graders = stack.enter_context(GradingPool(seconds=settings.evaluation.grading_seconds)) if first else None
    evaluator = None
    if sources.held_out:
        evaluator = Evaluator(settings.evaluation, sources.held_out, sources.prompts, seed=settings.run.seed)
    return Run(
        settings=settings,
        folder=folder,
        policy=policy,
        problems=sources.problems,
        prompts=sources.prompts,
        objective=make_objective(settings, sources.prompts, pool=_masker_pool(stack)),
        evaluator=evaluator,
        graders=graders,
        progress=progress,
        start=start,
        writes=first,
    )


@dataclass(frozen=True, kw_only=True)
class Run:
    """A training run with everything loaded."""

    settings: Settings
    folder: RunFolder
    policy: Policy
    problems: ProblemSet
    prompts: Prompts
    objective: Paint | Sft
    evaluator: Evaluator | None
    graders: GradingPool | None  # on the rank that grades
    progress: Progress
    start: int  # last step done
    writes: bool  # this rank writes the run folder

    def train(self) -> None:
        """All steps that are left, with what is due between them; ends with an evaluation, a checkpoint, an export."""
        run, clip_watch = self.settings.run, ClipWatch()
        before = self.evaluate(self.start)
        self.progress.start_clock()
        for step in range(self.start + 1, run.steps + 1):
            lr = learning_rate(step, steps=run.steps, settings=self.settings.optimizer)
            report = self.step(step, lr)
            self.record(report, clip_watch)
            last = step == run.steps
            if not last and run.evaluate_every and step % run.evaluate_every == 0:
                self.evaluate(step)
            if last or (run.save_every and step % run.save_every == 0):
                self.save(step)
            if last or (run.export_every and step % run.export_every == 0):
                self.policy.export(self.folder.hf_folder(step))
        after = self.evaluate(run.steps) if self.start < run.steps else before
        self.progress.note(
            f"Look next: megatron-paint inspect samples {self.folder.path} {run.steps}, "
            f"{self.folder.metrics_file}, {self.folder.hf_folder(run.steps)} (a Hugging Face checkpoint)"
        )
        self.progress.end(
            before=[before] if before else [], after=[after] if after else [], folder=str(self.folder.path)
        )

    def step(self, step: int, lr: float) -> StepReport:
        """One step; a loss or gradient that is not finite ends the run before a weight is touched."""
        try:
            return self.objective.step(self.policy, self.problems.batch(step), step=step, lr=lr)
        except FloatingPointError as error:
            raise UserError(
                f"step {step} stopped before the optimiser: {error}. The newest checkpoint of {self.folder.path} is "
                "whole; a lower optimizer.lr or optimizer.clip_grad is the usual cure"
            ) from error

    def record(self, report: StepReport, clip_watch: ClipWatch) -> None:
        """Writes the step's metrics and samples and says its line."""
        if not self.writes:
            return
        self.folder.append_metrics(report.metrics)
        self.folder.write_samples(report.step, sample_lines(report, decode=self.prompts.response_text))
        self.progress.step(report)
        if warning := clip_watch.update(report.metrics):
            self.progress.warn(warning)

    def evaluate(self, step: int) -> EvalReport | None:
        """Evaluates the current weights if there is a held-out file; the report on rank 0, None elsewhere."""
        if self.evaluator is None:
            return None
        benchmark = _benchmark(self.settings)
        report = self.evaluator.evaluate(self.policy, step=step, benchmark=benchmark, graders=self.graders)
        if report is not None and self.writes:
            self.folder.write_eval(report)
            self.progress.evaluation(report)
        return report

    def save(self, step: int) -> None:
        """A checkpoint from which a run goes on at any layout."""
        self.policy.save(self.folder.checkpoint_folder(step), {"step": step})

    def self_check(self) -> None:
        """Scores the model against itself: a wrong offset, mask or weight would show as a loss above rounding."""
        problems = self.problems.batch(1)[:SELF_CHECK_PROBLEMS]
        temperature = self.settings.objective.loss.temperature
        loss = DistillationLoss(
            config=InterpolationLossConfig(positions="none", temperature=temperature),
            chunk_bytes=self.settings.objective.chunk_bytes,
            token_temperature=1.0,
        )
        samples = [self._own_sample(problem) for problem in problems]
        scores = self.policy.evaluate_loss(samples, loss, teach_itself=True)
        floor = sum(score.loss_sum for score in scores) / sum(score.num_tokens for score in scores)
        limit = self.settings.run.self_check_limit
        self.progress.note(f"self-check: loss of the model against itself {floor:.2e} nats a token (limit {limit:g})")
        if not floor <= limit:
            raise UserError(
                f"self-check: the model differs from itself by {floor:.3g} nats a token, above "
                f"run.self_check_limit={limit:g}; with FP8 try another megatron.fp8_recipe or raise the limit"
            )

    def _own_sample(self, problem: Problem) -> Sample:
        prompt = self.prompts.student_prompt(problem)
        response = self.prompts.sft_response(problem)[: self.settings.rollout.max_new_tokens]
        return Sample(
            problem=problem,
            sample_index=0,
            key=0,
            student_prompt_ids=prompt,
            teacher_prompt_ids=prompt,
            response_ids=response,
        )


def _masker_pool(stack: ExitStack) -> MaskerPool | None:
    """Worker processes for the masker where a core is free for them; they start when a step has much to measure."""
    workers = min(8, (os.cpu_count() or 1) // 2)
    if workers < 2:
        return None
    pool = MaskerPool(workers)
    stack.callback(pool.close)
    return pool
