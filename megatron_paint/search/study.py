"""The study of a search: Optuna's trials, in a journal that several workers share and that survives a kill."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megatron_paint.base.errors import UserError
from megatron_paint.search.journal import JOURNAL, Claim, StudyLock, check_journal
from megatron_paint.search.space import Parameter, Space, Value

if TYPE_CHECKING:
    import optuna

NAME = "search"  # of the only study in a journal
CLAIMS = "claims"
REASON = "reason"  # user attribute of a trial: why it failed
NEEDS_OPTUNA = "search needs Optuna, which is not installed: pip install 'optuna>=5,<6' (or megatron-paint[search])"
State = Literal["waiting", "running", "complete", "pruned", "failed"]
STATES: dict[str, State] = {
    "WAITING": "waiting",
    "RUNNING": "running",
    "COMPLETE": "complete",
    "PRUNED": "pruned",
    "FAIL": "failed",
}


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """What the journal holds of one trial."""

    number: int
    state: State
    chosen: Mapping[str, Value]
    accuracies: Mapping[int, float] = field(default_factory=dict)  # by step, shares in [0, 1]
    reason: str = ""  # why it failed, or failed last time

    @property
    def is_ended(self) -> bool:
        """Whether it is never run again."""
        return self.state in ("complete", "pruned", "failed")

    @property
    def last_step(self) -> int | None:
        """The last step with an accuracy."""
        return max(self.accuracies, default=None)


class SearchStudy:
    """A study of one space in one folder. All its methods may be called by several processes side by side."""

    def __init__(self, folder: Path, space: Space, *, seed: int) -> None:
        """Opens the study, or creates it with trial 0, the given settings.

        UserError: Optuna is not installed, or the journal is damaged or another program's.
        """
        optuna = import_optuna()
        self.folder, self.space = folder, space
        self.lock = StudyLock(folder)
        self._claims: dict[int, Claim] = {}
        with self.lock.held():
            check_journal(folder / JOURNAL)
            self._storage = _storage(folder, self.lock)
            make = optuna.load_study if NAME in optuna.get_all_study_names(self._storage) else _create_study
            self._study = make(
                study_name=NAME, storage=self._storage, sampler=_sampler(space, seed), pruner=_pruner(space)
            )
            if not self._study.get_trials(deepcopy=False):
                self._study.enqueue_trial(space.default)
            self._check_trials()

    def trials(self) -> list[TrialRecord]:
        """All trials, by number."""
        return [_record(trial) for trial in self._study.get_trials(deepcopy=False)]

    def take(self, *, most: int, patient: bool) -> TrialRecord | None:
        """A trial for this worker: one whose worker died, else a new one if there are fewer than `most`; else None.

        The trial is this worker's until `end` or `give_back`. patient: also watch whether the worker of a trial on
        another machine lives, which takes up to minutes.
        """
        for trial in self.trials():
            is_free = trial.state == "running" and trial.number not in self._claims
            if is_free and self._claim(trial.number, patient=patient):
                if self.trials()[trial.number].state == "running":
                    return self._with_values(trial.number)
                self.give_back(trial.number)  # it ended in the meantime
        with self.lock.held():
            trials = self.trials()
            if all(trial.state != "waiting" for trial in trials) and len(trials) >= most:
                return None
            waiting = (trial.number for trial in trials if trial.state == "waiting")
            number = next(waiting, len(trials))
            # The claim comes first, or another worker would take the new trial for one whose worker died.
            if not self._claim(number, patient=True) or self._study.ask().number != number:
                raise UserError(f"{self.folder}: another program than `search` has changed trial {number} in {JOURNAL}")
            return self._with_values(number)

    def report(self, number: int, accuracies: Mapping[int, float]) -> int | None:
        """Records the accuracies of a trial by step. Returns the step at which to prune it; None: it continues.

        Trial 0 is never pruned: its end is what the others are compared with.
        """
        with self.lock.held():
            self._claims[number].confirm()
            trial = self._trial(number)
            known = dict(self._study.get_trials(deepcopy=False)[number].intermediate_values)
            for step, accuracy in sorted(accuracies.items()):
                if step not in known:
                    trial.report(accuracy, step)
                    known[step] = accuracy
                is_last = step >= self.space.settings.budget.steps
                if number and not is_last and step == max(known) and trial.should_prune():
                    return step
            return None

    def end(self, number: int, state: Literal["complete", "pruned", "failed"], *, reason: str = "") -> None:
        """Records the end of a trial. A complete one has the accuracy of its last step."""
        from optuna.trial import TrialState

        with self.lock.held():
            self._claims[number].confirm()
            stored = self._study.get_trials(deepcopy=False)[number]
            accuracies = stored.intermediate_values
            if reason != stored.user_attrs.get(REASON, ""):
                self._trial(number).set_user_attr(REASON, reason)
            match state:
                case "complete":
                    self._study.tell(number, accuracies[self.space.settings.budget.steps], TrialState.COMPLETE)
                case "pruned":
                    self._study.tell(number, state=TrialState.PRUNED)
                case "failed":
                    self._study.tell(number, state=TrialState.FAIL)
        self.give_back(number)

    def note_failure(self, number: int, reason: str) -> None:
        """Records why a trial failed that is to be tried again."""
        with self.lock.held():
            self._claims[number].confirm()
            self._trial(number).set_user_attr(REASON, reason)

    def give_back(self, number: int) -> None:
        """Leaves a trial to whoever takes it next. It keeps its state."""
        if claim := self._claims.pop(number, None):
            claim.release()

    def importance(self) -> dict[str, float]:
        """The importance of each parameter, which sum to 1; empty where too few trials are complete."""
        return importance_of(self._study)

    def bootstrap_studies(self, draws: "list[list[int]]") -> "list[optuna.Study]":
        """A study in memory of each list of trial numbers."""
        import optuna

        trials = self._study.get_trials(deepcopy=False)
        made = []
        for numbers in draws:
            study = optuna.create_study(direction="maximize")
            study.add_trials([trials[number] for number in numbers])
            made.append(study)
        return made

    def _check_trials(self) -> None:
        """UserError: the journal has a trial that no search of this space has written."""
        keys, steps = {parameter.key for parameter in self.space.parameters}, self.space.settings.budget.steps
        for trial in self.trials():
            if not trial.chosen.keys() <= keys or (trial.state == "complete" and steps not in trial.accuracies):
                raise UserError(
                    f"{self.folder / JOURNAL}: trial {trial.number} is not of this search; another program has written "
                    "it. Restore the file from a copy, or give another --out"
                )

    def _claim(self, number: int, *, patient: bool) -> bool:
        claim = Claim(self.folder / CLAIMS / f"{number:04d}")
        if (patient or not claim.seems_taken()) and claim.take():
            self._claims[number] = claim
            return True
        return False

    def _with_values(self, number: int) -> TrialRecord:
        """Chooses the values of a trial. Those that it has already, as after a kill, stay."""
        with self.lock.held():
            trial, chosen = self._trial(number), {}
            for parameter in self.space.parameters:
                if parameter.applies(chosen):
                    chosen[parameter.key] = _suggest(trial, parameter)
            return self.trials()[number]

    def _trial(self, number: int) -> "optuna.Trial":
        import optuna

        study_id = self._storage.get_study_id_from_name(NAME)
        return optuna.trial.Trial(self._study, self._storage.get_trial_id_from_study_id_trial_number(study_id, number))


def import_optuna() -> Any:
    """Optuna, which prints warnings only. UserError: it is not installed."""
    try:
        import optuna
    except ImportError:
        raise UserError(NEEDS_OPTUNA) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def importance_of(study: "optuna.Study") -> dict[str, float]:
    """The importance of each parameter by PED-ANOVA (arXiv 2304.10255), Optuna's default evaluator.

    It compares where the best tenth of the complete trials lies with where all lie.
    """
    import optuna

    complete = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    if len(complete) < 4 or len({trial.value for trial in complete}) < 2:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = optuna.importance.get_param_importances(study)
    return {key: float(value) for key, value in found.items()}


def _create_study(**options: Any) -> "optuna.Study":
    import optuna

    return optuna.create_study(direction="maximize", **options)


def _storage(folder: Path, lock: StudyLock) -> "optuna.storages.JournalStorage":
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    return JournalStorage(JournalFileBackend(str(folder / JOURNAL), lock_obj=lock))


def _sampler(space: Space, seed: int) -> "optuna.samplers.BaseSampler":
    from megatron_paint.search.sampler import KeyedTPESampler

    return KeyedTPESampler(seed=seed, startup_trials=space.settings.sampler.startup_trials)


def _pruner(space: Space) -> "optuna.pruners.BasePruner":
    import optuna

    pruner, every = space.settings.pruner, space.settings.budget.evaluate_every
    match pruner.rule:
        case "median":
            return optuna.pruners.MedianPruner(n_startup_trials=pruner.startup_trials)
        case "halving":
            return optuna.pruners.SuccessiveHalvingPruner(min_resource=every, reduction_factor=pruner.factor)
        case "none":
            return optuna.pruners.NopPruner()


def _suggest(trial: "optuna.Trial", parameter: Parameter) -> Value:
    if parameter.low is None:
        return trial.suggest_categorical(parameter.key, parameter.choices)
    if parameter.whole:
        step = 1 if parameter.step is None else int(parameter.step)
        return trial.suggest_int(parameter.key, int(parameter.low), int(parameter.high), step=step, log=parameter.log)
    return trial.suggest_float(parameter.key, parameter.low, parameter.high, step=parameter.step, log=parameter.log)


def _record(trial: "optuna.trial.FrozenTrial") -> TrialRecord:
    return TrialRecord(
        number=trial.number,
        state=STATES[trial.state.name],
        chosen=dict(trial.params),
        accuracies=dict(trial.intermediate_values),
        reason=trial.user_attrs.get(REASON, ""),
    )
