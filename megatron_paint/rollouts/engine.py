"""The seam between what needs responses and what samples them: an objective, an evaluation or the self-check asks a
`Sampler`; the model in this process, a file of recorded rollouts or another engine implements it.
"""

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_paint.config.settings import EvaluationSettings, RolloutSettings
from megatron_paint.records import Rollout, TokenIds


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParameters:
    """How tokens are drawn; temperature 0 is greedy."""

    max_new_tokens: int
    temperature: float
    top_p: float  # in (0, 1]
    top_k: int  # 0 keeps all
    stop_ids: frozenset[int]

    @classmethod
    def from_settings(
        cls, settings: RolloutSettings | EvaluationSettings, *, stop_ids: Collection[int]
    ) -> "SamplingParameters":
        """The parameters that a section of settings asks for."""
        return cls(
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            stop_ids=frozenset(stop_ids),
        )

    def greedy(self) -> "SamplingParameters":
        """The same at temperature 0."""
        return dataclasses.replace(self, temperature=0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationRequest:
    """One response to sample. `key` holds all its randomness."""

    problem_id: str
    sample_index: int
    prompt_ids: TokenIds
    key: int  # non-negative, 63 bits
    step: int = 0  # the training step that the response is for; 0: none, such as an evaluation


class Sampler(Protocol):
    """A rollout engine. Every rank calls with the same arguments and gets the same results."""

    def generate(self, requests: Sequence[GenerationRequest], sampling: SamplingParameters) -> list[Rollout]:
        """One response per request, in order.

        A response depends on its request and the weights alone: not on the layout, nor on the other requests (float32,
        ties aside).
        """

    def sync_weights(self, step: int) -> None:
        """Makes the engine sample with the weights that training step `step` starts from; called before it samples."""

    def release_memory(self) -> None:
        """Called when nothing is sampled until the next `sync_weights`: the trainer needs the GPUs that they share."""

    def metrics(self) -> dict[str, float]:
        """What the engine measured since the last call, by the keys of metrics.jsonl; those of rank 0 are recorded."""
