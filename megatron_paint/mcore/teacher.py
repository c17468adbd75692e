"""The teacher's weights: the initial ones, the current ones, or a moving average of the student's.

With LoRA the initial teacher is the model without its adapters, or with those that the run continues from, and an
average covers only the adapters. With full fine-tuning both are a second set of this rank's weights, on the device or
in host memory. An average can be anchored: it then moves towards a mixture of the student's weights and the initial
ones, a third set. This keeps the teacher near the initial weights however far the student moves.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from megatron_paint.config.objective import TeacherSettings
from megatron_paint.mcore.lora import adapters_of
from megatron_paint.mcore.model import Stage

Weights = Literal["teacher", "initial"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherStates:
    """What the student's loss needs from the teacher: hidden states on the last stage, by the sample's index.

    None: the loss does not need it; output_weight_VH: None where the teacher has the student's output layer.
    """

    hidden_NH: dict[int, Tensor] | None  # of each sample: final hidden states at its N response rows
    full_hidden_NH: dict[int, Tensor] | None  # the same, after the prompt with the complete reference
    output_weight_VH: Tensor | None
    initial_hidden_NH: dict[int, Tensor] | None = None  # of the initial weights, after the student's prompt
    initial_output_weight_VH: Tensor | None = None


class Teacher:
    """The further sets of weights of this rank that the settings need.

    keeps_initial: the loss also needs the initial weights, whatever the teacher's are. starts_adapted: the adapters of
    the start are not zero, so the initial weights include them.
    """

    def __init__(
        self, stage: Stage, settings: TeacherSettings, *, keeps_initial: bool = False, starts_adapted: bool = False
    ):
        self.stage = stage
        self.settings = settings
        self.lora = bool(adapters_of(stage))
        self.starts_bare = self.lora and not starts_adapted  # the initial weights are the model without its adapters
        shares = settings.weights == "current" or (self.starts_bare and settings.weights == "initial")
        self.held = {} if shares else self._snapshot(average=settings.weights == "ema")
        # In the weights' own type: they never change.
        keeps_start = self._is_anchored or (keeps_initial and not self.starts_bare and settings.weights != "initial")
        self.start = self._snapshot() if keeps_start else {}

    def _parameters(self, values: dict[str, Tensor]) -> dict[str, nn.Parameter]:
        """The stage's parameters that a set of weights replaces."""
        # On a single stage a tied weight has two names; named_parameters returns it once.
        return {name: p for name, p in self.stage.named_parameters() if name in values}

    @property
    def _is_anchored(self) -> bool:
        return self.settings.weights == "ema" and self.settings.ema_anchor > 0

    @torch.no_grad()
    def _snapshot(self, *, average: bool = False) -> dict[str, Tensor]:
        """Copies of the trained weights, on the storage device.

        An average is float32: in bfloat16 its small changes would round to 0.
        """
        dtype = torch.float32 if average else None
        trained = {name: p for name, p in self.stage.named_parameters() if p.requires_grad}
        return {name: p.detach().to(self._storage(p), dtype, copy=True) for name, p in trained.items()}

    def _storage(self, parameter: Tensor) -> torch.device:
        return torch.device("cpu") if self.settings.offload else parameter.device

    def _values(self, weights: Weights) -> dict[str, Tensor]:
        """The set of weights that replaces the student's."""
        if weights == "teacher" or self.settings.weights == "initial":
            return self.held
        if not self.starts_bare and not self.start:
            raise RuntimeError("the initial weights were not kept: objective.loss asked for none when the run started")
        return {} if self.starts_bare else self.start

    @contextmanager
    def in_place(self, weights: Weights = "teacher") -> Iterator[None]:
        """Inside, the stage computes with these weights; gradients are not allowed there."""
        are_initial = weights == "initial" or self.settings.weights == "initial"
        values = self._values(weights)
        parameters = self._parameters(values)
        students = {name: p.data for name, p in parameters.items()}
        for adapters in adapters_of(self.stage):
            adapters.enabled = not (self.starts_bare and are_initial)
        for name, parameter in parameters.items():
            parameter.data = values[name].to(parameter.device, parameter.dtype)
        try:
            yield
        finally:
            for name, parameter in parameters.items():
                parameter.data = students[name]
            for adapters in adapters_of(self.stage):
                adapters.enabled = True

    def output_weight(self, weights: Weights = "teacher") -> Tensor | None:
        """The output layer of these weights in the student's type, if it differs from the student's; otherwise None.

        Only the last stage has one.
        """
        values = self._values(weights)
        if not values or self.lora or not self.stage.has_output:
            return None
        weight = self.stage.output_weight()
        (name,) = (name for name, p in self._parameters(values).items() if p is weight)
        return values[name].to(weight.device, weight.dtype)

    @torch.no_grad()
    def follow(self) -> None:
        """Moves an average towards the student. Called after each optimiser step; other teachers do not change."""
        if self.settings.weights != "ema":
            return
        for name, parameter in self._parameters(self.held).items():
            goal = parameter.detach().to(self.held[name])
            if self._is_anchored:
                goal = goal.lerp(self.start[name].to(goal), self.settings.ema_anchor)
            self.held[name].lerp_(goal, 1 - self.settings.ema_decay)

    def sharded_state_dict(self, student: dict) -> dict:
        """The teacher's entries for a checkpoint: the student's sharding, the teacher's values."""
        entries = {}
        for prefix, values in self._sets.items():
            for name, value in values.items():
                entry = student[name]
                # An average has a wider type than its weight. An entry that is split later (gate, up) has no type yet.
                type_ = {"dtype": value.dtype} if hasattr(entry, "dtype") else {}
                key = f"{prefix}.{entry.key}"
                entries[f"{prefix}.{name}"] = dataclasses.replace(entry, key=key, data=value, **type_)
        return entries

    @torch.no_grad()
    def load(self, loaded: dict) -> None:
        """Copies the teacher's values out of a loaded checkpoint. `loaded` has the keys of `sharded_state_dict`."""
        for prefix, values in self._sets.items():
            for name, value in values.items():
                value.copy_(loaded[f"{prefix}.{name}"])

    @property
    def _sets(self) -> dict[str, dict[str, Tensor]]:
        """The sets of weights that a checkpoint holds of the teacher, by the prefix of their names."""
        return {"teacher": self.held, "teacher.start": self.start}
