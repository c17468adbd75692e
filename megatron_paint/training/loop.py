"""The training loop: problems in, a Hugging Face checkpoint out. Every rank runs it; rank 0 writes and speaks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_paint.base.errors import UserError
from megatron_paint.config.saved import plain
from megatron_paint.config.schedule import due_after, learning_rate, outlived
from megatron_paint.config.settings import Settings
from megatron_paint.data.problems import ProblemSet
from megatron_paint.data.prompts import Prompts
from megatron_paint.evaluation.evaluator import Answers, Evaluator
from megatron_paint.grading.grade import GradingPool
from megatron_paint.objectives import Objective
from megatron_paint.objectives.metrics import ClipWatch, sample_lines
from megatron_paint.policy import Policy
from megatron_paint.records import StepReport
from megatron_paint.run.console import Progress
from megatron_paint.run.folder import RunFolder
from megatron_paint.run.results import print_results
from megatron_paint.runtime.heartbeat import beat
from megatron_paint.runtime.pace import Pace
from megatron_paint.runtime.rank_zero import OnRankZero

if TYPE_CHECKING:
    pass


def _benchmark(settings: Settings) -> str:
    return Path(str(settings.evaluation.problems)).stem


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
    on_rank_zero: OnRankZero
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
        self.on_rank_zero(self.end)
        return True

    def step(self, step: int, clip_watch: ClipWatch) -> None:
        """One step of the objective, recorded; or counted where its loss or gradient is not finite."""
        beat("rollout", step)
        lr = learning_rate(step, steps=self.settings.run.steps, settings=self.settings.optimizer)
        try:
            report = self.objective.step(self.policy, self.problems.batch(step), step=step, lr=lr)
            self.on_rank_zero(lambda: self.record(report, clip_watch))
        except FloatingPointError as error:
            self.on_rank_zero(lambda error=error: self.leave_out(step, error))

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
        if not self.on_rank_zero(lambda: self.folder.holds("checkpoint", step)):
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
            done = step == self.start and self.on_rank_zero(lambda task=task: self.folder.holds(task, step))
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
            self.on_rank_zero(
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
            self.on_rank_zero(lambda: self.grade(answers, step))

    def grade(self, answers: Answers, step: int) -> None:
        """Grades, writes and says an evaluation; the work of one rank."""
        benchmark = _benchmark(self.settings)
        report = self.evaluator.report(answers, step=step, benchmark=benchmark, graders=self.graders)
        self.folder.write_eval(report)
        self.progress.evaluation(report)

    def end(self) -> None:
        """Prints the results, as the run folder has them."""
        print_results(self.folder, self.progress, last=self.settings.run.steps)
