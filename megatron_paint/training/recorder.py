"""What rank 0 writes into the run folder and prints while a run trains."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from megatron_paint.base.counts import agreeing, count_text
from megatron_paint.base.errors import UserError
from megatron_paint.config.settings import Settings
from megatron_paint.data.prompts import Prompts
from megatron_paint.evaluation.benchmarks import benchmark_name
from megatron_paint.evaluation.evaluator import Answers, Evaluator
from megatron_paint.grading.graders import Graders
from megatron_paint.objectives.metrics import ClipWatch, no_answer_share, sample_lines
from megatron_paint.records import StepReport
from megatron_paint.run.console import Progress
from megatron_paint.run.folder import RunFolder
from megatron_paint.run.learning_watch import LearningWatch
from megatron_paint.run.loggers.loggers import Loggers
from megatron_paint.run.results import print_results, shares_text


@dataclass(frozen=True, kw_only=True)
class Recorder:
    """Metrics, samples and evaluations of a run. Its methods are called on rank 0 alone."""

    settings: Settings
    folder: RunFolder
    progress: Progress
    prompts: Prompts
    graders: Graders | None  # None where nothing is evaluated on this rank
    loggers: Loggers = field(default_factory=Loggers)
    clip_watch: ClipWatch = field(default_factory=ClipWatch)
    learning_watch: LearningWatch = field(default_factory=LearningWatch)

    def __post_init__(self) -> None:
        for line in self.folder.read_metrics():  # of the steps before this start, whose warnings were given
            self.learning_watch.update(line)

    def step(self, report: StepReport) -> None:
        """Writes the metrics and samples of a step and prints its line and its warnings."""
        lines = sample_lines(report, decode=self.prompts.response_text)
        metrics = report.metrics | {"response/no_answer_share": no_answer_share(lines, self.settings.domains)}
        report = replace(report, metrics=metrics)
        self.folder.append_metrics(metrics)
        self.folder.write_samples(report.step, lines)
        self.progress.step(report)
        self.loggers.step(report, lines)
        if self.settings.objective.loss.clips_entries and (warning := self.clip_watch.update(metrics)):
            self.progress.warn(warning)
        for warning in self.learning_watch.update(metrics):
            self.progress.warn(warning)

    def skipped_step(self, step: int, error: FloatingPointError) -> None:
        """Counts a step whose loss or gradient is not finite; the step changed no weight.

        Raises UserError if the run has more of them than `run.max_skipped_steps`.
        """
        before = sum("skipped" in line for line in self.folder.read_metrics())
        allowed = self.settings.run.max_skipped_steps
        if before >= allowed:
            counted = (
                f"; {count_text(before, 'step')} {agreeing(before, 'was', 'were')} skipped before, all that "
                "run.max_skipped_steps allows"
                if allowed
                else ""
            )
            raise UserError(
                f"step {step} stopped before the optimiser: {error}{counted}. The files in {self.folder.path} are "
                "complete; a lower optimizer.lr or optimizer.clip_grad is the usual cure"
            ) from error
        self.folder.append_metrics({"step": step, "skipped": str(error)})
        self.progress.warn(f"step {step} is skipped ({before + 1} of at most {allowed}): {error}")

    def evaluation(self, evaluator: Evaluator, answers: Answers, step: int) -> None:
        """Grades an evaluation, writes its report and prints its line."""
        benchmark = benchmark_name(str(self.settings.evaluation.problems))
        report = evaluator.report(answers, step=step, benchmark=benchmark, graders=self.graders)
        self.folder.write_eval(report)
        self.progress.evaluation(report)
        self.loggers.evaluation(report)

    def end(self, waited: Mapping[str, float]) -> None:
        """Completes the logs, and prints the results as the run folder has them.

        waited: seconds of this start by part: step, checkpoint, export, evaluation.
        """
        self.loggers.close("finished")
        if len(waited) > 1:
            self.progress.note(shares_text("time of this start", waited))
        print_results(self.folder, self.progress, last=self.settings.run.steps)
