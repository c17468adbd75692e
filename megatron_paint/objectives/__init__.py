"""The algorithms, readable without knowing Megatron: each turns a batch of problems into one step of a policy."""

from megatron_paint.objectives.grpo import Grpo
from megatron_paint.objectives.interface import Objective, ObjectiveInputs
from megatron_paint.objectives.paint import Paint
from megatron_paint.objectives.sft import Sft

__all__ = ["OBJECTIVES", "Grpo", "Objective", "ObjectiveInputs", "Paint", "Sft"]

# By objective.name.
OBJECTIVES: dict[str, type[Objective]] = {
    "paint": Paint,
    "opsd": Paint,
    "grpo": Grpo,
    "sft": Sft,
}
