"""The algorithms, readable without knowing Megatron: each turns a batch of problems into one step of a policy."""

from collections.abc import Sequence
from typing import Protocol

from megatron_paint.config.settings import Settings
from megatron_paint.data.prompts import Prompts
from megatron_paint.grading.grade import GradingPool
from megatron_paint.masker.overlap import MaskerPool
from megatron_paint.objectives.grpo import Grpo
from megatron_paint.objectives.paint import Paint
from megatron_paint.objectives.sft import Sft
from megatron_paint.policy import Policy
from megatron_paint.records import Problem, StepReport
from megatron_paint.runtime.rank_zero import OnRankZero, directly

__all__ = ["Grpo", "Objective", "Paint", "Sft", "make_objective"]


class Objective(Protocol):
    """What a run asks of an algorithm."""

    def step(self, policy: Policy, problems: Sequence[Problem], *, step: int, lr: float) -> StepReport:
        """One step on a batch of problems; FloatingPointError where a loss or gradient is not finite."""


def make_objective(
    settings: Settings,
    prompts: Prompts,
    *,
    pool: MaskerPool | None = None,
    graders: GradingPool | None = None,
    on_rank_zero: OnRankZero = directly,
) -> Objective:
    """The objective that `objective.name` asks for.

    on_rank_zero: runs a function on rank 0 and returns its result on all ranks; `pool` and `graders` exist on rank 0.
    """
    if settings.objective.name == "sft":
        return Sft(settings, prompts)
    if settings.objective.name == "grpo":
        return Grpo(settings, prompts, graders=graders, on_rank_zero=on_rank_zero)
    return Paint(settings, prompts, pool=pool, on_rank_zero=on_rank_zero)
