"""The training loop: steps, and what is due after each. Every rank runs it; rank 0 writes and prints."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from megatron_paint.base.errors import UserError
from megatron_paint.checkpoints.hf_writer import CARD
from megatron_paint.config.schedule import due_after, expired_checkpoints, learning_rate
from megatron_paint.config.secrets import recorded_tree
from megatron_paint.config.settings import Settings
from megatron_paint.data.order import ProblemOrder
from megatron_paint.data.problems import ProblemSet
from megatron_paint.evaluation.evaluator import Answers, Evaluator
from megatron_paint.objectives import Objective
from megatron_paint.objectives.metrics import metrics_of
from megatron_paint.policy import Policy
from megatron_paint.records import StepReport
from megatron_paint.report.model_card import card_of_run
from megatron_paint.rollouts.engine import Sampler
from megatron_paint.rollouts.source import RolloutSource
from megatron_paint.run.console import Progress
from megatron_paint.run.folder import RunFolder
from megatron_paint.runtime.files import write_atomically
from megatron_paint.runtime.heartbeat import mark_progress
from megatron_paint.runtime.pace import Pace
from megatron_paint.runtime.rank_zero import OnRankZero
from megatron_paint.runtime.stop import StopRequested
from megatron_paint.runtime.timer import Timer
from megatron_paint.training.peak_memory import peak_memory
from megatron_paint.training.recorder import Recorder


@dataclass(frozen=True, kw_only=True)
class Run:
    """A training run with everything loaded."""

    settings: Settings
    folder: RunFolder
    policy: Policy
    problems: ProblemSet
    order: ProblemOrder
    objective: Objective
    rollouts: RolloutSource  # of the objective
    sampler: Sampler  # of evaluations
    evaluator: Evaluator | None
    recorder: Recorder
    progress: Progress
    start: int  # last step done
    on_rank_zero: OnRankZero
    # Why to stop, on all ranks together; given the seconds until the next question.
    stop_reason: Callable[[float], str | None] = lambda seconds: None
    confirm_owner: Callable[[], None] = lambda: None  # raises UserError if another process owns the folder now
    # Profiles a step and what follows it, if run.profile names the step.
    profiled: Callable[[int], AbstractContextManager[None]] = lambda step: nullcontext()
    pace: Pace = field(default_factory=Pace)

    def train(self) -> bool:
        """Does all remaining steps, each followed by what is due after it. Returns False if it was asked to stop."""
        try:
            return self.all_steps()
        except UserError as error:
            self.rescue_save(error)
            raise

    def all_steps(self) -> bool:
        """The loop: each step, then what is due after it. Returns False if it stopped early, with a checkpoint."""
        try:
            self.follow_up(self.start)
            self.progress.start_clock()
            for step in range(self.start + 1, self.settings.run.steps + 1):
                with self.profiled(step):
                    self.step(step)
                    self.follow_up(step)
        except StopRequested as request:
            self.stop(request)
            return False
        mark_progress("checkpoint")
        self.finish_save()
        self.on_rank_zero(lambda: self.recorder.end(self.pace.total))
        return True

    def step(self, step: int) -> None:
        """One step of the objective, recorded; or counted as skipped if a loss or gradient is not finite or too large.

        The order of the problems does not count a skipped step: no weight has learned from its problems.
        """
        mark_progress("rollout", step)
        lr = learning_rate(step, steps=self.settings.run.steps, settings=self.settings.optimizer)
        timer = Timer()
        try:
            with self.pace.timed("step"):
                with timer("step"):
                    result = self.objective.step(self.policy, self.order.batch(step), step=step, lr=lr, timer=timer)
                metrics = metrics_of(result, step=step, lr=lr, seconds=timer.seconds)
                metrics |= self.order.record(step, result.verdicts) | self.sampler.metrics() | peak_memory()
                report = StepReport(
                    step=step,
                    metrics=metrics,
                    samples=result.samples,
                    scores=result.scores,
                    warnings=result.warnings,
                    seconds=timer.seconds["step"],
                )
                self.confirm_owner()
                self.on_rank_zero(lambda: self.recorder.step(report))
        except FloatingPointError as error:
            self.on_rank_zero(lambda error=error: self.recorder.skipped_step(step, error))

    def follow_up(self, step: int) -> None:
        """Checkpoint, export and evaluation, where they are due.

        At the step that the run starts from, it does only what an earlier attempt did not complete.
        """
        self.finish_save(wait=False)
        tasks = {"checkpoint": self.save, "export": self.export, "evaluation": self.evaluate}
        due = due_after(step, self.settings.run)
        if due:
            self.check_stop(step, due)
        for task in due:
            is_done = step == self.start and self.on_rank_zero(lambda task=task: self.folder.holds(task, step))
            if not is_done:
                mark_progress(task, step)
                self.confirm_owner()
                with self.pace.timed(task), Timer()(task):
                    tasks[task](step)
        self.check_stop(step, ["step"])

    def check_stop(self, step: int, coming: Sequence[str]) -> None:
        """Raises StopRequested after `step` if the run was asked to stop, or if time is too short for what comes next.

        coming: what the run does until the next question. After the last step nothing is asked.
        """
        if step < self.settings.run.steps and (reason := self.stop_reason(self.pace.expected(coming))) is not None:
            raise StopRequested(step=step, reason=reason)

    def stop(self, request: StopRequested) -> None:
        """Ends the run between two steps, with a checkpoint of the last one."""
        step, reason = request.step, request.reason
        if step == 0:
            self.progress.result(
                f"Stopped before the first step by {reason}; {self.folder.again()} begins it",
                step=step,
                reason=reason,
            )
            return
        mark_progress("checkpoint", step)
        self.finish_save()
        if not self.on_rank_zero(lambda: self.folder.holds("checkpoint", step)):
            self.confirm_owner()
            self.save(step, wait=False)
            self.finish_save()
        self.progress.result(
            f"Stopped after step {step} by {reason}; {self.folder.again()} continues from "
            f"{self.folder.checkpoint_folder(step)}",
            step=step,
            reason=reason,
        )

    def save(self, step: int, *, wait: bool = True) -> None:
        """Starts a checkpoint that any layout can resume; with `run.async_save`, training continues meanwhile.

        wait: for the rollouts of the next step that are being sampled; else those that are missing are sampled in it.
        """
        self.finish_save()  # the checkpoint before
        ahead = self.rollouts.state_dict(wait=wait)
        self.pace.begin("write")
        state = {"step": step, "settings": recorded_tree(self.settings)}
        if order := self.order.state_dict():
            state["order"] = order
        if ahead:
            state["ahead"] = ahead
        self.policy.save(self.folder.checkpoint_folder(step), state)
        if not self.settings.run.async_save:
            self.finish_save()

    def finish_save(self, *, wait: bool = True) -> None:
        """Once a started checkpoint is complete, removes the older ones that `run.keep_last` and `run.keep_every` drop.

        With `wait`, blocks until it is complete. UserError: writing it failed.
        """
        if self.policy.finish_save(wait=wait):
            self.pace.end("write")
            self.on_rank_zero(
                lambda: self.folder.remove_checkpoints(
                    expired_checkpoints(self.folder.checkpoints(), self.settings.run)
                )
            )

    def rescue_save(self, error: UserError) -> None:
        """Waits for a checkpoint that is being written while the run ends by an error.

        It asks no other rank anything, because the error may be this rank's alone. Raises UserError if the write failed
        too.
        """
        mark_progress("checkpoint")
        try:
            self.policy.finish_save(wait=True)
        except UserError as another:
            raise UserError(f"{error}. And the checkpoint that was being written is not complete: {another}") from error

    def export(self, step: int) -> None:
        """Writes a Hugging Face checkpoint with a model card."""
        card = self.on_rank_zero(lambda: card_of_run(self.folder, self.settings, step))
        self.policy.export(self.folder.hf_folder(step), card=card)

    def evaluate(self, step: int) -> None:
        """Evaluates the current weights if there are held-out problems."""
        if self.evaluator is not None:
            self.sampler.sync_weights(step + 1)
            answers = self.evaluator.sample(self.sampler)
            self.sampler.release_memory()
            self.on_rank_zero(lambda: self.record_evaluation(answers, step))

    def record_evaluation(self, answers: Answers, step: int) -> None:
        """Writes the report of an evaluation, and adds it to the model card of the same step's export."""
        self.recorder.evaluation(self.evaluator, answers, step)
        if self.folder.hf_folder(step).is_dir():
            write_atomically(self.folder.hf_folder(step) / CARD, card_of_run(self.folder, self.settings, step))
