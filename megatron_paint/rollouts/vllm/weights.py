"""What a weight transfer asks of the trainer: the model's tensors under their Hugging Face names, in messages."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor, dtype


class WeightSource(Protocol):
    """The trainer's current weights. Every rank calls with the same arguments.

    A message holds complete modules: vLLM fuses q, k and v, gate and up, and all experts of a layer, and fills what is
    missing of a fused module with memory that nobody has written.
    """

    def plan(self, message_bytes: int) -> list[list[str]]:
        """The names of the tensors in each message that this rank will write, in the model's type, adapters merged.

        A message has at most `message_bytes` bytes, or one module. Empty lists are messages that other ranks write.
        """

    def message(self, number: int) -> "Mapping[str, Tensor]":
        """The tensors of message `number` on the rank that writes it; empty on the others. All ranks call together."""

    def check_finite(self) -> None:
        """Called before the messages of an update; all ranks call together.

        UserError: a weight of this rank is not finite.
        """

    def shapes(self) -> Mapping[str, Sequence[int]]:
        """The shape of every tensor that the servers must get, by its name."""

    def export(self, folder: Path) -> None:
        """Writes a Hugging Face folder of the current weights, adapters merged, that a server can start with."""

    def export_adapters(self, folder: Path) -> None:
        """Writes a PEFT folder of the current adapters."""


class DeviceWeights(WeightSource, Protocol):
    """The same for a transfer between GPUs: tensors stay on the device of the rank, and no rank has a part alone."""

    dtype: "dtype"  # of every tensor

    def plan(self, message_bytes: int) -> list[list[str]]:
        """The names of the tensors in each message, of all pipeline stages in their order; the same on every rank."""

    def message(self, number: int) -> "Mapping[str, Tensor]":
        """All tensors of a message, in the order of the plan, on each rank that takes part; empty on the others.

        All ranks call together. Nothing that computes on the device is under way when it returns.
        """

    def free_memory(self) -> None:
        """Gives memory that this rank keeps for later back to the device."""
