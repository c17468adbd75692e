"""The inputs of a token loss, and what it must provide.

Axes: N response tokens of a micro-batch, H hidden size, V vocabulary (complete, or this rank's slice).
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from megatron_paint.losses.output import LossOutput
from megatron_paint.losses.vocab import VocabAxis
from megatron_paint.records import Sample


@dataclass(frozen=True, kw_only=True)
class ResponseRows:
    """A micro-batch as a loss gets it: the rows that predict response tokens, rollout after rollout."""

    samples: tuple[Sample, ...]  # one per response
    lengths: tuple[int, ...]  # response tokens of each; they sum to N
    token_ids_N: Tensor  # the response tokens
    student_hidden_NH: Tensor
    output_weight_VH: Tensor
    vocab: VocabAxis
    teacher_hidden_NH: Tensor | None = None
    teacher_output_weight_VH: Tensor | None = None  # None: the student's
    full_teacher_hidden_NH: Tensor | None = None
    initial_hidden_NH: Tensor | None = None  # of the initial weights, after the student's prompt
    initial_output_weight_VH: Tensor | None = None  # None: the student's


class TokenLoss(Protocol):
    """A loss over response tokens. It knows a vocabulary axis but no machine, and returns sums, never means."""

    needs_teacher: bool
    needs_full_teacher: bool
    needs_initial: bool  # the initial weights on the student's prompt
    keeps_logprobs: bool  # whether the scores must hold every token's log-probability

    def __call__(self, rows: ResponseRows) -> LossOutput: ...
