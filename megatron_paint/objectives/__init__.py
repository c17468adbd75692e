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
from megatron_paint.runtime.rank_zero import Share, directly

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
    share: Share = directly,
) -> Objective:
    """The objective that `objective.name` asks for.

    share: has one rank run a function and gives all of them its result; `pool` and `graders` are that rank's.
    """
    if settings.objective.name == "sft":
        return Sft(settings, prompts)
    if settings.objective.name == "grpo":
        return Grpo(settings, prompts, graders=graders, share=share)
    return Paint(settings, prompts, pool=pool, share=share)
