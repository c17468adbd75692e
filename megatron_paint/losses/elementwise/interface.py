"""The elementwise work of the fused loss on a chunk of logits: the interface of its backends.

Axes: T tokens, V this rank's vocabulary columns, K packed statistics or sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from megatron_paint.losses.elementwise.softmax_statistics import Softmax, TokenQuery


@dataclass(kw_only=True)
class ChunkLogits:
    """Logits of a chunk; partner_TV is None if the student is the partner.

    deciding_TV: those that decide the support; None: no support. It can be the buffer of the student or of the partner.
    floor_T: the smallest energy in the support.
    A shift is the amount subtracted from each row of the buffer so far; None: nothing.
    """

    student_TV: torch.Tensor
    teacher_TV: torch.Tensor
    partner_TV: torch.Tensor | None
    deciding_TV: torch.Tensor | None = None
    floor_T: torch.Tensor | None = None
    student_shift_T: torch.Tensor | None = None
    teacher_shift_T: torch.Tensor | None = None
    partner_shift_T: torch.Tensor | None = None


class Target(NamedTuple):
    """Normalisers of student and target over all ranks; weight_T: lambda of each token's target; 0: plain teacher."""

    student: Softmax
    target: Softmax
    weight_T: torch.Tensor


class Work(NamedTuple):
    """The result of sums(), for gradient(); sums_TK: this rank's part of the sums for divergences.finish()."""

    sums_TK: torch.Tensor
    logits: ChunkLogits
    target: Target
    dlogits_TV: torch.Tensor | None  # the gradient, if it needs no sums


class Passes(Protocol):
    """The elementwise passes over a chunk's logits; they may overwrite the logits."""

    divides_by_temperature: bool  # whether the logits that are passed are not divided by the temperature yet

    def statistics(self, logits: ChunkLogits, query: TokenQuery | None) -> torch.Tensor:
        """Statistics [T, K] of this rank's columns: see split_statistics."""

    def sums(self, logits: ChunkLogits, target: Target, scale_T: torch.Tensor | None) -> Work:
        """The divergences' sums. scale_T: the scale that gradient() will get; None: no gradient is wanted."""

    def gradient(self, work: Work, coefficient_T: torch.Tensor, scale_T: torch.Tensor) -> torch.Tensor:
        """The loss's gradient [T, V] with respect to the student's logits before the temperature.

        coefficient_T: c of the gradient c p - B (docs/numerics.md), from the sums of all ranks. scale_T: factor of each
        token, which includes 1 / temperature.
        """

    def copy(self, logits: ChunkLogits) -> ChunkLogits:
        """A copy of the logits for another sums() and gradient(), which do not change these."""


class PackedStatistics(NamedTuple):
    """Packed statistics [..., K]: student, teacher (maximum, sum, weighted sum); support: the teacher's maximum and sum
    over the support, and its size; mixed (maximum, sum; over the support if there is one); uncut: maximum and sum of
    the interpolation over everything, if there is a support; token (two)."""

    student: torch.Tensor
    teacher: torch.Tensor
    support: torch.Tensor | None
    mixed: torch.Tensor | None
    uncut: torch.Tensor | None
    token: torch.Tensor | None


def split_statistics(packed: torch.Tensor, *, support: bool, mixed: bool, token: bool) -> PackedStatistics:
    """Splits what Passes.statistics packed, from one rank or from all ranks."""
    widths = {"student": 3, "teacher": 3, "support": 3 * support, "mixed": 2 * mixed, "uncut": 2 * (mixed and support)}
    widths["token"] = 2 * token
    parts = dict(zip(widths, packed.split(list(widths.values()), dim=-1), strict=True))
    return PackedStatistics(**{name: part if widths[name] else None for name, part in parts.items()})
