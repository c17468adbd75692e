"""Whose weights score as teacher: the initial ones, the current ones, or their moving average.

With LoRA the initial teacher is the model with its adapters off and an average covers the adapters alone; with full
fine-tuning both are a second set of this rank's weights, on the device or in host memory.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from megatron_paint.config import TeacherSettings
from megatron_paint.mcore.lora import adapters_of
from megatron_paint.mcore.model import Qwen3Model


class Teacher:
    """The second set of weights of this rank, if the settings need one."""

    def __init__(self, stage: Qwen3Model, settings: TeacherSettings):
        self.stage = stage
        self.settings = settings
        self.lora = bool(adapters_of(stage))
        self.held = self._snapshot()

    @property
    def held_parameters(self) -> dict[str, nn.Parameter]:
        """The stage's parameters that the teacher has its own values of."""
        if self.settings.weights == "current" or (self.lora and self.settings.weights == "initial"):
            return {}
        # A tied weight stands under two names on a lone stage; named_parameters gives it once.
        return {name: p for name, p in self.stage.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def _snapshot(self) -> dict[str, Tensor]:
        """Values on the device they rest on: an average is kept in float32, or it would stand still in bfloat16."""
        dtype = torch.float32 if self.settings.weights == "ema" else None
        return {name: p.detach().to(self._home(p), dtype, copy=True) for name, p in self.held_parameters.items()}

    def _home(self, parameter: Tensor) -> torch.device:
        return torch.device("cpu") if self.settings.offload else parameter.device

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The stage computes with the teacher's weights inside; no gradient may be taken there."""
        adapters_off = self.lora and self.settings.weights == "initial"
        students = {name: p.data for name, p in self.held_parameters.items()}
        for adapters in adapters_of(self.stage):
            adapters.enabled = not adapters_off
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
        """The teacher's output layer where it differs from the student's, in the student's type; None where not.

        Only the last stage has one.
        """
        if not self.held or self.lora or not self.stage.post_process:
            return None
        weight = self.stage.output_weight()
        (name,) = (name for name, p in self.held_parameters.items() if p is weight)
        return self.held[name].to(weight.device, weight.dtype)

    @torch.no_grad()
    def follow(self) -> None:
        """Moves an average towards the student, once after each optimiser step."""
        if self.settings.weights != "ema":
            return
        for name, parameter in self.held_parameters.items():
            self.held[name].lerp_(parameter.detach().to(self.held[name]), 1 - self.settings.ema_decay)

    def sharded_state_dict(self, student: dict) -> dict:
        """Entries for a checkpoint, beside the student's own: the same sharding, other values."""
        entries = {}
        for name, value in self.held.items():
            entry = student[name]
            # An average is wider than the weight it follows; an entry that is cut later (gate and up) has no type yet.
            type_ = {"dtype": value.dtype} if hasattr(entry, "dtype") else {}
            entries[f"teacher.{name}"] = dataclasses.replace(entry, key=f"teacher.{entry.key}", data=value, **type_)
        return entries

    @torch.no_grad()
    def load(self, loaded: dict) -> None:
        """Takes the values up that `sharded_state_dict` asked for."""
        for name, value in self.held.items():
            value.copy_(loaded[f"teacher.{name}"])
