"""The trials in a folder, as another program reads them."""

from pathlib import Path

import optuna

from megatron_paint.search.journal import StudyLock
from megatron_paint.search.study import NAME, TrialRecord, _record, _storage


def read_trials(folder: Path) -> list[TrialRecord]:
    """All trials of the study in a folder. KeyError: there is none."""
    study = optuna.load_study(study_name=NAME, storage=_storage(folder, StudyLock(folder)))
    return [_record(trial) for trial in study.get_trials(deepcopy=False)]
