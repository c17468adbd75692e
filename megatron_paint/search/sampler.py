"""The sampler of a study: Optuna's TPE, whose random numbers depend on nothing but seed, trial and parameter."""

from typing import Any

from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial

from megatron_paint.base.keys import derive_key

SEEDS = 1 << 32  # of numpy's RandomState, which Optuna draws from


class KeyedTPESampler(BaseSampler):
    """TPE without a generator whose state a restart would lose: each trial and parameter has a key.

    So a resumed study chooses what the unbroken one would have chosen from the same earlier trials. Trials that run are
    counted as bad ones (constant liar), so that workers side by side do not choose the same values.
    """

    def __init__(self, *, seed: int, startup_trials: int) -> None:
        self._seed, self._startup_trials = seed, startup_trials

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._sampler(trial, "").infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._sampler(trial, "").sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._sampler(trial, param_name).sample_independent(study, trial, param_name, param_distribution)

    def _sampler(self, trial: FrozenTrial, name: str) -> TPESampler:
        key = derive_key(self._seed, "search", trial.number, name)
        return TPESampler(
            seed=key % SEEDS, n_startup_trials=self._startup_trials, multivariate=True, constant_liar=True
        )
