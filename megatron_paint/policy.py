"""The seam between an objective and the machine: what an algorithm can ask of a policy."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from megatron_paint.losses.interface import TokenLoss
from megatron_paint.records import Sample, SampleScore, TokenIds, UpdateReport


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredSequence:
    """Tokens to score: `response_ids`, which follow `prompt_ids`."""

    prompt_ids: TokenIds
    response_ids: TokenIds

    @property
    def num_tokens(self) -> int:
        """Tokens that the model reads: the last response token predicts nothing that is scored."""
        return len(self.prompt_ids) + len(self.response_ids) - 1


class Policy(Protocol):
    """A model that scores responses and learns from them, on any number of machines. A `Sampler` samples.

    Every rank calls with the same arguments and gets the same results.
    """

    # `update` calls it when the gradient is known and no weight is changed yet. It may score with the policy.
    before_change: Callable[[], None]

    def update(self, samples: Sequence[Sample], loss: TokenLoss, *, lr: float) -> UpdateReport:
        """One optimiser step on the sum of the loss over the samples, divided once by the tokens that carry loss.

        lr: learning rate of this step. FloatingPointError: a loss or the gradient is not finite; no weight was changed.
        """

    def evaluate_loss(
        self, samples: Sequence[Sample], loss: TokenLoss, *, teach_itself: bool = False
    ) -> tuple[SampleScore, ...]:
        """The loss of each sample without a step. With `teach_itself` the current weights are the teacher.

        FloatingPointError: a loss is not finite.
        """

    def logprobs(
        self,
        sequences: Sequence[ScoredSequence],
        *,
        weights: Literal["teacher", "current"],
        temperature: float = 1.0,
    ) -> list[tuple[float, ...]]:
        """Log-probabilities in nats of each sequence's response tokens.

        weights: those of the teacher, or the current ones. FloatingPointError: a log-probability is not finite.
        """

    def save(self, folder: Path, state: dict[str, Any]) -> None:
        """Starts to write a checkpoint: weights, optimiser, teacher and `state`; complete or absent.

        Its content is copied before this returns; the write continues in the background. Only one write can run at a
        time: see `finish_save`.
        """

    def finish_save(self, *, wait: bool) -> bool:
        """Returns True exactly once, after the checkpoint started by `save` is complete on disk.

        With `wait`, blocks until then. UserError: writing failed, and there is no checkpoint.
        """

    def load(self, folder: Path) -> dict[str, Any]:
        """Loads a checkpoint that was written at any layout, and returns its state."""

    def export(self, folder: Path, *, card: str | None = None) -> None:
        """Writes a Hugging Face checkpoint that `transformers` can load. card: the text of its model card."""
