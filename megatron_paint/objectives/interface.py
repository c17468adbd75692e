"""What an objective is given, and what it promises."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from megatron_paint.config.domains import DomainSettings
from megatron_paint.config.objective import ObjectiveSettings
from megatron_paint.data.prompts import Prompts
from megatron_paint.grading.graders import Graders
from megatron_paint.masker.overlap import MaskerPool
from megatron_paint.policy import Policy
from megatron_paint.records import Problem, StepResult
from megatron_paint.rollouts.source import RolloutSource
from megatron_paint.runtime.rank_zero import OnRankZero, directly
from megatron_paint.runtime.timer import Timer


@dataclass(frozen=True, kw_only=True)
class ObjectiveInputs:
    """What a run builds for its objective. `Settings.needs` decides what is built; the rest is None."""

    settings: ObjectiveSettings
    prompts: Prompts
    rollouts: RolloutSource
    masker: MaskerPool | None = None  # on rank 0; None: the masker works in this process
    grades_rollouts: bool = False  # all rollouts get verdicts: for the objective, or for the order of the problems
    graders: Graders | None = None  # on rank 0, if rollouts get verdicts
    domains: Mapping[str, DomainSettings] = field(default_factory=dict)  # the section of this name
    on_rank_zero: OnRankZero = directly  # runs a function on rank 0 and returns its result on every rank


class Objective(Protocol):
    """An algorithm: it turns a batch of problems into one step of a policy."""

    def __init__(self, inputs: ObjectiveInputs): ...

    def step(self, policy: Policy, problems: Sequence[Problem], *, step: int, lr: float, timer: Timer) -> StepResult:
        """One step on a batch of problems. The timer gets the phases that the policy does not time itself.

        With `ObjectiveInputs.grades_rollouts` the result has verdicts on all rollouts of each problem. Raises
        FloatingPointError, before any weight is changed, where a loss or gradient is not finite.
        """

    @staticmethod
    def longest_prompt(problem: Problem, prompts: Prompts, settings: ObjectiveSettings, *, response: int) -> int:
        """Most tokens that a sequence of this problem can have before a response of at most `response` tokens.

        Where the solution is trained on, it counts as a part of the prompt and `response` is 0.
        """
