"""Adapters of a mixture's experts as PEFT stores them: one matrix A and one B for all experts of a layer.

`transformers` 5 stacks the experts of a layer in two parameters, and PEFT adapts these (`target_parameters`). It wraps
the experts' module once for each; the wrapper of down_proj contains that of gate_up_proj. A has an expert's rows one
after another; in B, the experts are the faster index of the columns (peft 0.21, `ParamWrapper.get_delta_weight`).

Axes: E experts of a layer, K rank of the adapters, I inputs, O outputs.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor

from megatron_paint.checkpoints.peft import STACKED

_EXPERT = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight")


@dataclass(frozen=True, kw_only=True)
class ExpertWeight:
    """Where the Hugging Face weight of one expert is in the stacked parameters."""

    layer: int
    expert: int
    stacked: str
    half: int | None  # of the stacked rows: 0 gate, 1 up; None: all


def expert_weight(name: str) -> ExpertWeight | None:
    """The place of the weight `name`; None: it is not an expert's."""
    if (found := _EXPERT.fullmatch(name)) is None:
        return None
    half = {"gate": 0, "up": 1, "down": None}[found[3]]
    stacked = "down_proj" if half is None else "gate_up_proj"
    return ExpertWeight(layer=int(found[1]), expert=int(found[2]), stacked=stacked, half=half)


def stacked_key(layer: int, stacked: str, side: str, *, targets: Collection[str] = STACKED) -> str:
    """PEFT's name of A or B of a stacked parameter. targets: those that have adapters."""
    inner = "base_layer." if stacked == "gate_up_proj" and len(targets) == 2 else ""
    return f"base_model.model.model.layers.{layer}.mlp.experts.{inner}lora_{side}.weight"


def packed(side: str, values: Tensor) -> Tensor:
    """A [E, K, I] or B [E, O, K] as PEFT's matrix."""
    if side == "A":
        return values.flatten(0, 1)
    return values.permute(1, 2, 0).flatten(1)


def unpacked(side: str, matrix: Tensor, experts: int) -> Tensor:
    """PEFT's matrix as A [E, K, I] or B [E, O, K]."""
    if side == "A":
        return matrix.unflatten(0, (experts, -1))
    return matrix.unflatten(1, (-1, experts)).permute(2, 0, 1)


def of_expert(weight: ExpertWeight, a_EKI: Tensor, b_EOK: Tensor) -> tuple[Tensor, Tensor]:
    """A [K, I] and B [O, K] of one weight."""
    a_KI, b_OK = a_EKI[weight.expert], b_EOK[weight.expert]
    return a_KI, b_OK if weight.half is None else b_OK.chunk(2)[weight.half]
