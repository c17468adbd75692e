"""The teacher's weights: the initial ones, the current ones, or a moving average of the student's.

With LoRA the initial teacher is the model without its adapters, or with those that the run continues from, and an
average covers only the adapters. With full fine-tuning both are a second set of this rank's weights, on the device or
in host memory. An average can be anchored: it then moves towards a mixture of the student's weights and the initial
ones, a third set. This keeps the teacher near the initial weights however far the student moves.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from megatron_paint.config.objective import TeacherSettings
from megatron_paint.mcore.lora import adapters_of
from megatron_paint.mcore.model import Stage


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherStates:
    """What the student's loss needs from the teacher: hidden states on the last stage, by the sample's index.

    None: the loss does not need it; output_weight_VH: None where the teacher has the student's output layer.
    """

    hidden_NH: dict[int, Tensor] | None  # of each sample: final hidden states at its N response rows
    full_hidden_NH: dict[int, Tensor] | None  # the same, after the prompt with the complete reference
    output_weight_VH: Tensor | None


class Teacher:
    """The second set of weights of this rank, if the settings need one."""

    def __init__(self, stage: Stage, settings: TeacherSettings, *, starts_adapted: bool = False):
        """starts_adapted: the adapters of the start are not zero, so the initial weights include them."""
        self.stage = stage
        self.settings = settings
        self.lora = bool(adapters_of(stage))
        self.starts_without = self.lora and settings.weights == "initial" and not starts_adapted
        self.held = self._snapshot()
        # In the weights' own type: they never change.
        self.start = self._snapshot(average=False) if self._is_anchored else {}

    @property
    def held_parameters(self) -> dict[str, nn.Parameter]:
        """The stage's parameters for which the teacher has separate values."""
        if self.settings.weights == "current" or self.starts_without:
            return {}
        # On a single stage a tied weight has two names; named_parameters returns it once.
        return {name: p for name, p in self.stage.named_parameters() if p.requires_grad}

    @property
    def _is_anchored(self) -> bool:
        return self.settings.weights == "ema" and self.settings.ema_anchor > 0

    @torch.no_grad()
    def _snapshot(self, *, average: bool = True) -> dict[str, Tensor]:
        """Copies on the storage device. An average is float32: in bfloat16 its small changes would round to 0."""
        dtype = torch.float32 if average and self.settings.weights == "ema" else None
        return {name: p.detach().to(self._storage(p), dtype, copy=True) for name, p in self.held_parameters.items()}

    def _storage(self, parameter: Tensor) -> torch.device:
        return torch.device("cpu") if self.settings.offload else parameter.device

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the stage computes with the teacher's weights; gradients are not allowed there."""
        students = {name: p.data for name, p in self.held_parameters.items()}
        for adapters in adapters_of(self.stage):
            adapters.enabled = not self.starts_without
        for name, parameter in self.held_parameters.items():
            parameter.data = self.held[name].to(parameter.device, parameter.dtype)
        try:
            yield
        finally:
            for name, parameter in self.held_parameters.items():
                parameter.data = students[name]
            for adapters in adapters_of(self.stage):
                adapters.enabled = True

    def output_weight(self) -> Tensor | None:
        """The teacher's output layer in the student's type, if it differs from the student's; otherwise None.

        Only the last stage has one.
        """
        if not self.held or self.lora or not self.stage.post_process:
            return None
        weight = self.stage.output_weight()
        (name,) = (name for name, p in self.held_parameters.items() if p is weight)
        return self.held[name].to(weight.device, weight.dtype)

    @torch.no_grad()
    def follow(self) -> None:
        """Moves an average towards the student; called once after each optimiser step."""
        if self.settings.weights != "ema":
            return
        for name, parameter in self.held_parameters.items():
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
