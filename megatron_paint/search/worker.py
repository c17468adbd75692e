"""The loop of a worker: it takes trials, watches their runs, prunes them, and ends when none is left to take."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_paint.base.counts import agreeing, count_text
from megatron_paint.base.errors import UserError
from megatron_paint.run.console import Progress
from megatron_paint.runtime.signals import RecordedSignals
from megatron_paint.runtime.stop import STOPPED, STOPPING
from megatron_paint.search.space import Space
from megatron_paint.search.study import SearchStudy, TrialRecord
from megatron_paint.search.text import chosen_text, percent
from megatron_paint.search.trial_run import Place, TrialRun, remove_weights, trial_folder

POLL_SECONDS = 0.3
MISTAKE = 2  # exit status of a user's mistake, which a repetition cannot correct
MAX_IDLE_ATTEMPTS = 2  # so many starts in a row without a newer checkpoint fail a trial; as for jobs of Slurm
LOOK_AGAIN_SECONDS = 30.0  # before trials of other workers are looked at again


@dataclass
class _Running:
    """A trial of this worker, while its run lasts."""

    run: TrialRun
    checkpoint: int  # newest one before this attempt
    idle: int = 0  # attempts in a row that brought no newer checkpoint
    prune_at: int | None = None
    seen: set[int] = field(default_factory=set)  # steps whose accuracy was reported


class Worker:
    """Runs trials of a study at several places of this machine."""

    def __init__(
        self, study: SearchStudy, space: Space, *, out: Path, most: int, places: Sequence[Place], progress: Progress
    ) -> None:
        """most: number of trials of the study, with all that exist."""
        self.study, self.space, self.out, self.most, self.progress = study, space, out, most, progress
        self._free = list(places)
        self._running: dict[int, _Running] = {}
        self._signals = RecordedSignals(STOPPING)
        self._stops = False
        self._look_again = 0.0  # when to ask for a trial again, after there was none

    def work(self) -> int:
        """Runs trials until none is left to take. Returns 0, or 75 if it was asked to stop and trials are left.

        The first Ctrl-C, SIGTERM or SIGUSR1 stops its runs after their step, with a checkpoint; a second one kills
        them. Either way the same command continues them. UserError: trial 0, the given settings, fails.
        """
        with self._signals:
            try:
                while True:
                    self._fill()
                    if not self._running:
                        return STOPPED if self._stops else 0
                    time.sleep(POLL_SECONDS)
                    self._check_signals()
                    for number in list(self._running):
                        self._look_at(number)
            finally:
                for number in list(self._running):
                    self._running[number].run.kill()
                    self._leave(number)

    def _fill(self) -> None:
        """Starts trials at the free places."""
        while self._free and not self._stops and time.monotonic() >= self._look_again:
            # Without a run to watch, there is time to find out whether the owner of a trial on another machine lives.
            trial = self.study.take(most=self.most, patient=not self._running)
            if trial is None:
                self._look_again = time.monotonic() + LOOK_AGAIN_SECONDS
                return
            self._begin(trial)

    def _begin(self, trial: TrialRecord) -> None:
        run = TrialRun(out=self.out, number=trial.number, place=self._free.pop(0))
        checkpoint = run.folder.latest_checkpoint() or 0
        again = f", resumed after step {checkpoint}" if checkpoint else ""
        self.progress.note(f"trial {trial.number}{again}: {chosen_text(trial.chosen)}", trial=trial.number)
        self._running[trial.number] = _Running(run, checkpoint, seen=set(trial.accuracies))
        try:
            run.write_settings(self.space, trial.chosen)
        except UserError as error:
            self._fail(trial.number, f"the settings refuse this combination: {error}")
            return
        if not self._ends_early(trial.number):
            run.start()

    def _look_at(self, number: int) -> None:
        """Reports what a run has measured since, and follows its end."""
        running = self._running[number]
        status = running.run.process.poll()  # before its folder is read: what it wrote last counts
        self._report(number)
        if status is None:
            return
        if running.prune_at is not None:
            self._prune(number)
        elif status == 0:
            self._complete(number)
        elif self._stops or status == STOPPED:
            if not self._stops:  # its job ends soon, or somebody stopped it: a new start would be stopped too
                self._stops = True
                self.progress.result(f"trial {number} was stopped, and not by this search: no other trial is started")
            self._leave(number)
        else:
            self._again(number, status)

    def _report(self, number: int) -> None:
        """Records new accuracies. A trial that is to be pruned is asked to stop."""
        running = self._running[number]
        found = running.run.accuracies(self.space.settings.budget.steps, without=running.seen)
        if running.prune_at is not None or not found:
            return
        for step, accuracy in found.items():
            self.progress.note(f"trial {number} at step {step}: {percent(accuracy)}", trial=number, step=step)
        running.seen |= found.keys()
        running.prune_at = self.study.report(number, found)
        if running.prune_at is not None and running.run.process is not None:
            running.run.stop()

    def _ends_early(self, number: int) -> bool:
        """Prunes a resumed trial whose accuracies ask for that; returns whether it did."""
        running = self._running[number]
        found = running.run.accuracies(self.space.settings.budget.steps)
        if not found:
            return False
        running.prune_at = self.study.report(number, found)
        running.seen |= found.keys()
        if running.prune_at is not None:
            self._prune(number)
            return True
        return False

    def _complete(self, number: int) -> None:
        if self.space.settings.budget.steps not in self._running[number].seen:
            self._fail(number, "its run ended without the evaluation of the last step")
            return
        self.study.end(number, "complete")
        self._leave(number)
        trial = self.study.trials()[number]
        self.progress.result(
            f"trial {number} complete: {percent(trial.accuracies[self.space.settings.budget.steps])}", trial=number
        )
        self._keep_best_weights()

    def _prune(self, number: int) -> None:
        step = self._running[number].prune_at
        self.study.end(number, "pruned")
        remove_weights(self._running[number].run.path)
        self._leave(number)
        self.progress.result(f"trial {number} pruned at step {step}", trial=number, step=step)

    def _again(self, number: int, status: int) -> None:
        """Starts a failed run again while its attempts bring new checkpoints, unless it failed by a mistake."""
        running = self._running[number]
        newest = running.run.folder.latest_checkpoint() or 0
        running.idle = 0 if newest > running.checkpoint else running.idle + 1
        running.checkpoint = newest
        if status == MISTAKE or running.idle >= MAX_IDLE_ATTEMPTS:
            self._fail(number, f"exit status {status}: {running.run.reason()}")
            return
        self.progress.warn(f"trial {number} ended with exit status {status} and is started again from step {newest}")
        running.run.start()

    def _fail(self, number: int, reason: str) -> None:
        """Ends a trial as failed. Trial 0 stays to be tried again. UserError: it is trial 0."""
        if number == 0:
            self.study.note_failure(number, reason)
            self._leave(number)
            raise UserError(
                f"trial 0, the given settings, fails, and nothing can be compared with it: {reason} "
                f"({trial_folder(self.out, 0)}). After the cause is gone, the same command tries it again. Other "
                "settings are another search: give another --out"
            )
        self.study.end(number, "failed", reason=reason)
        remove_weights(self._running[number].run.path)
        self._leave(number)
        self.progress.warn(f"trial {number} failed: {reason}")

    def _leave(self, number: int) -> None:
        """Frees the place of a trial. One that has not ended is left to whoever takes it next."""
        self._look_again = 0.0
        self._free.append(self._running.pop(number).run.place)
        self.study.give_back(number)

    def _keep_best_weights(self) -> None:
        """Removes the weights of complete trials, except those of trial 0 and of the best so far."""
        complete = [trial for trial in self.study.trials() if trial.state == "complete"]
        kept = {0, best_of(complete, self.space.settings.budget.steps).number}
        for trial in complete:  # none of the others can become the best one
            if trial.number not in kept:
                remove_weights(trial_folder(self.out, trial.number))

    def _check_signals(self) -> None:
        if self._signals.count == 0:
            return
        if not self._stops:
            self._stops = True
            self.progress.on_stderr(
                f"megatron-paint: {self._signals.signal.name}: {count_text(len(self._running), 'trial')} "
                f"{agreeing(len(self._running), 'stops', 'stop')} after the current step, with a checkpoint; the same "
                "command continues. A second signal ends everything at once"
            )
            for running in self._running.values():
                running.run.stop()
        if self._signals.count > 1:
            raise KeyboardInterrupt(f"{self.out} keeps the study, and the same command continues it")


def best_of(complete: Sequence[TrialRecord], steps: int) -> TrialRecord:
    """The trial with the highest accuracy at its last step; of equal ones the first."""
    return max(complete, key=lambda trial: (trial.accuracies[steps], -trial.number))
