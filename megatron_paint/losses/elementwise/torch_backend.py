"""The elementwise work on a chunk of logits in torch, tile by tile: the reference for Triton, and the CPU backend.

The temporaries of a tile fit into a CPU's second-level cache, where arithmetic is up to ten times as fast as in memory.
Logits become differences to their maximum over this rank's columns, then p and B (see divergences.py), all in place.
 Axes: T tokens, V this rank's vocabulary columns, K packed statistics or sums.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch

from megatron_paint.config.loss import InterpolationLossConfig
from megatron_paint.losses.elementwise.divergences import coefficient_is_one, divergence_of, take_terms
from megatron_paint.losses.elementwise.interface import ChunkLogits, Target, Work, split_statistics
from megatron_paint.losses.elementwise.softmax_statistics import (
    EMPTY_MAX,
    TokenQuery,
    centred_statistics,
    token_statistics,
)
from megatron_paint.losses.elementwise.support import cut, outside
from megatron_paint.losses.output_layer.chunks import Scratch, tiles

# A sum of exponentials below this has lost digits: it is relative to a bound far above the true maximum.
_SMALLEST_SUM = 1e-30


class _Decider(NamedTuple):
    """The logits that decide the support of some rows, and the floor of each row in the same units."""

    energies_TV: torch.Tensor
    floor_T: torch.Tensor


class TorchPasses:
    """Implements `interface.Passes`; elements: vocabulary entries of a tile."""

    divides_by_temperature = False

    def __init__(self, config: InterpolationLossConfig, *, elements: int) -> None:
        self.config, self.elements = config, elements
        self.divergence = divergence_of(config)
        self._scratch, self._mask = Scratch(), Scratch()

    def statistics(self, logits: ChunkLogits, query: TokenQuery | None) -> torch.Tensor:
        """[T, K], in the order of split_statistics; replaces the logits by centred ones."""
        token_TK = None if query is None else token_statistics(logits.student_TV, query, self.elements)
        logits.partner_shift_T = self._centre(logits.partner_TV)
        height = max(1, self.elements // max(1, logits.student_TV.shape[1]))
        blocks = [
            self._block(logits, slice(start, start + height)) for start in range(0, len(logits.student_TV), height)
        ]
        packed_TK = torch.cat(blocks)
        logits.student_shift_T, logits.teacher_shift_T = packed_TK[:, 0].clone(), packed_TK[:, 3].clone()
        parts = split_statistics(packed_TK, support=self.config.supports, mixed=self.config.interpolates, token=False)
        for part_TK, weight, over_support in (
            (parts.support, 0.0, True),
            (parts.mixed, self.config.target_weight, self.config.supports),
            (parts.uncut, self.config.target_weight, False),
        ):
            if part_TK is None:
                continue
            vanished_T = part_TK[:, 1] < _SMALLEST_SUM
            if (
                over_support
            ):  # without an entry in the support a row has the maximum over no columns: a bound could be larger
                empty_T = parts.support[:, 2] == 0.0
                part_TK[:, 0].masked_fill_(empty_T, EMPTY_MAX)
                vanished_T &= ~empty_T
            self._repair_vanished(logits, part_TK, vanished_T, weight=weight, over_support=over_support)
        return packed_TK if query is None else torch.cat((packed_TK, token_TK), dim=1)

    def sums(self, logits: ChunkLogits, target: Target, scale_T: torch.Tensor | None) -> Work:
        """This rank's part of the sums; replaces the logits by p and B, or by p and the gradient."""
        self._centre_all(logits)
        target_shift_T = self._mix_in_place(logits, target)
        # Differences to the local maximum are small where they matter: subtracting a rounded constant yields log p.
        student_T = (target.student.max_T - logits.student_shift_T) + target.student.sum_T.log()
        target_T = (target.target.max_T - target_shift_T) + target.target.sum_T.log()
        decider = None
        if self.config.supports:
            decider = self._decider(logits, slice(None), student_shift_T=logits.student_shift_T)
        sums_TK = logits.student_TV.new_zeros((len(student_T), self.divergence.sums(self.config)))
        forms = scale_T is not None and coefficient_is_one(self.config)
        for rows, columns in tiles(logits.student_TV, self.elements):
            # The student's logits may decide the support, so this is first.
            outside_TV = self._outside(decider, rows, columns) if self.config.supports else None
            p_TV = logits.student_TV[rows, columns].sub_(student_T[rows, None])
            b_TV = logits.teacher_TV[rows, columns].sub_(target_T[rows, None])
            if outside_TV is not None:
                cut(b_TV, outside_TV)
            sums_TK[rows] += torch.stack(take_terms(p_TV, b_TV, self.config), dim=1)
            if forms:
                b_TV.sub_(p_TV).mul_(-scale_T[rows, None])
        return Work(sums_TK, logits, target, logits.teacher_TV if forms else None)

    def gradient(self, work: Work, coefficient_T: torch.Tensor, scale_T: torch.Tensor) -> torch.Tensor:
        """scale (c p - B) [T, V], in the teacher's buffer."""
        if work.dlogits_TV is not None:
            return work.dlogits_TV
        p_TV, b_TV = work.logits.student_TV, work.logits.teacher_TV
        scaled_T = scale_T * coefficient_T
        for rows, columns in tiles(p_TV, self.elements):
            b_TV[rows, columns].mul_(-scale_T[rows, None]).addcmul_(p_TV[rows, columns], scaled_T[rows, None])
        return b_TV

    def copy(self, logits: ChunkLogits) -> ChunkLogits:
        """Copies student and teacher; the partner is only read after it is centred."""
        self._centre_all(logits)
        student_TV = logits.student_TV.clone()
        deciding_TV = student_TV if logits.deciding_TV is logits.student_TV else logits.deciding_TV
        return replace(logits, student_TV=student_TV, teacher_TV=logits.teacher_TV.clone(), deciding_TV=deciding_TV)

    def _centre_all(self, logits: ChunkLogits) -> None:
        """Centres logits that are new in these buffers, after their statistics are known."""
        if logits.student_shift_T is None:
            logits.student_shift_T = self._centre(logits.student_TV)
            logits.teacher_shift_T = self._centre(logits.teacher_TV)
            logits.partner_shift_T = self._centre(logits.partner_TV)

    def _decider(self, logits: ChunkLogits, rows: slice, *, student_shift_T: torch.Tensor) -> _Decider:
        """What decides the support of these rows; student_shift_T: what was subtracted from the student's by now."""
        floor_T = logits.floor_T[rows]
        if logits.deciding_TV is logits.student_TV:
            floor_T = floor_T - student_shift_T
        elif logits.deciding_TV is logits.partner_TV:
            floor_T = floor_T - logits.partner_shift_T[rows]
        return _Decider(logits.deciding_TV[rows], floor_T)

    def _outside(self, decider: _Decider, rows: slice, columns: slice) -> torch.Tensor:
        """1.0 outside the support, else 0.0, in memory that the next call overwrites."""
        energies_TV = decider.energies_TV[rows, columns]
        return outside(energies_TV, decider.floor_T[rows], out=self._mask.like(energies_TV))

    def _centre(self, values_TV: torch.Tensor | None) -> torch.Tensor | None:
        if values_TV is None:
            return None
        if not values_TV.shape[1]:
            return values_TV.new_full((len(values_TV),), EMPTY_MAX)
        max_T = values_TV.amax(1)
        values_TV.sub_(max_T[:, None])
        return max_T

    def _partner(self, logits: ChunkLogits) -> tuple[torch.Tensor, torch.Tensor]:
        if logits.partner_TV is None:
            return logits.student_TV, logits.student_shift_T
        return logits.partner_TV, logits.partner_shift_T

    def _block(self, logits: ChunkLogits, rows: slice) -> torch.Tensor:
        """Statistics of a few rows, one distribution after the other, while the rows are in the cache."""
        student_TV, teacher_TV = logits.student_TV[rows], logits.teacher_TV[rows]
        parts = [centred_statistics(student_TV, self.elements, self._scratch)]
        decider, visit, inside_TK = None, None, student_TV.new_zeros((len(student_TV), 2))
        if self.config.supports:
            decider = self._decider(logits, rows, student_shift_T=parts[0][:, 0])

            def visit(part: slice, columns: slice, exp_TV: torch.Tensor) -> None:
                outside_TV = self._outside(decider, part, columns)
                inside_TK[part, 1] += exp_TV.shape[1] - outside_TV.sum(1)
                inside_TK[part, 0] += _sum_inside(exp_TV, outside_TV)

        parts.append(centred_statistics(teacher_TV, self.elements, self._scratch, visit=visit))
        if decider is not None:
            parts.append(torch.cat((parts[1][:, :1], inside_TK), dim=1))
        if not self.config.interpolates:
            return torch.cat(parts, dim=1)
        weight, partner_TV, partner_shift_T = self.config.target_weight, student_TV, parts[0][:, 0]
        if logits.partner_TV is not None:
            partner_TV, partner_shift_T = logits.partner_TV[rows], logits.partner_shift_T[rows]
        # The interpolation of the maxima bounds the maximum of the interpolation, which saves a search for it.
        bound_T, none_T = torch.lerp(parts[1][:, 0], partner_shift_T, weight), torch.zeros_like(partner_shift_T)
        mixed_TK, inside_T = torch.stack((bound_T, none_T), 1), none_T.clone()
        for part, columns in tiles(partner_TV, self.elements):
            ends = (teacher_TV[part, columns], partner_TV[part, columns])
            mixed_TV = torch.lerp(*ends, weight, out=self._scratch.like(ends[0]))
            mixed_TK[part, 1] += mixed_TV.exp_().sum(1)
            if decider is not None:
                inside_T[part] += _sum_inside(mixed_TV, self._outside(decider, part, columns))
        if decider is not None:
            parts.append(torch.stack((bound_T, inside_T), 1))
        return torch.cat((*parts, mixed_TK), dim=1)

    def _repair_vanished(
        self,
        logits: ChunkLogits,
        packed_TK: torch.Tensor,
        vanished_T: torch.Tensor,
        *,
        weight: float,
        over_support: bool,
    ) -> None:
        """Far below the bound the sum vanishes. Such rows, of extreme logits, use their true maximum instead.

        packed_TK: bound and sum of the interpolation with this weight, over the support or over everything.
        """
        partner_TV, _ = self._partner(logits)
        if not partner_TV.shape[1]:
            return
        for row in vanished_T.nonzero().flatten().tolist():
            row_V = torch.lerp(logits.teacher_TV[row], partner_TV[row], weight)
            if over_support:
                here = slice(row, row + 1)
                decider = self._decider(logits, here, student_shift_T=logits.student_shift_T[here])
                row_V = row_V[decider.energies_TV[0] >= decider.floor_T]
            bound = packed_TK[row, 0].clone()
            packed_TK[row, 0] += row_V.amax()
            # sums() subtracts the rounded maximum, so this subtracts the same.
            packed_TK[row, 1] = row_V.sub_(packed_TK[row, 0] - bound).exp_().sum()

    def _mix_in_place(self, logits: ChunkLogits, target: Target) -> torch.Tensor:
        """Replaces the teacher's logits by the target's; returns their shift [T]."""
        if not self.config.interpolates:
            return logits.teacher_shift_T
        partner_TV, partner_shift_T = self._partner(logits)
        if partner_TV.is_cuda:
            for rows, columns in tiles(partner_TV, self.elements):
                teacher_TV = logits.teacher_TV[rows, columns]
                teacher_TV.lerp_(partner_TV[rows, columns], target.weight_T[rows, None])
        else:
            for row in target.weight_T.nonzero().flatten().tolist():
                logits.teacher_TV[row].lerp_(partner_TV[row], self.config.target_weight)
        return torch.lerp(logits.teacher_shift_T, partner_shift_T, target.weight_T)


def _sum_inside(exp_TV: torch.Tensor, outside_TV: torch.Tensor) -> torch.Tensor:
    """The sum [T] of a tile's exponentials over the support; overwrites `outside_TV`. An entry outside is x - 1 x."""
    return torch.addcmul(exp_TV, exp_TV, outside_TV, value=-1.0, out=outside_TV).sum(1)
