"""The passes over chunks of logits behind fused_interpolation_loss.

Per chunk: two matrix products compute the student's and the teacher's logits. One collective merges softmax statistics
and entropies, which determine the selection; a second one merges the divergences. Then dlogits W and dlogits^T h.
A support needs the maximum of the logits that decide it before the statistics. It joins the second collective of the
chunk before. The first chunk of a call, and every chunk that is redone, take one small collective more.
With a sharded vocabulary the second collective of a chunk overlaps with the next chunk's products to logits, and the
next chunk's first collective overlaps with this chunk's products of the gradient.
Which tokens are selected is known only after the complete rollout was seen. If a rollout does not fit into one chunk,
all its tokens are first treated as the more frequent case; the tokens for which this was wrong are redone. Cost:
4 (1 + wrong fraction) matrix products of all rows; two separate passes would cost 6.
Axes: T response tokens, V this rank's vocabulary columns without padding, H hidden, R ranks, K packed statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from megatron_paint.config.loss import InterpolationLossConfig
from megatron_paint.losses.elementwise.divergences import Outcome, finish
from megatron_paint.losses.elementwise.interface import ChunkLogits, Passes, Target, Work, split_statistics
from megatron_paint.losses.elementwise.softmax_statistics import (
    EMPTY_MAX,
    Softmax,
    merge_entropy,
    merge_softmax,
    merge_token_logp,
    query_tokens,
)
from megatron_paint.losses.elementwise.support import outside_mass, support_floor
from megatron_paint.losses.output import InterpolationOutput
from megatron_paint.losses.output_layer.chunks import Chunk, ChunkSize, plan_chunks
from megatron_paint.losses.output_layer.products import OutputLayerGradient, Projection, inverse
from megatron_paint.losses.selection import select_blindly, select_positions
from megatron_paint.losses.vocab import VocabAxis

Rows = slice | torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The arguments: detached, weights without padding rows; dtype is that of the logits."""

    student_TH: torch.Tensor
    teacher_TH: torch.Tensor
    full_teacher_TH: torch.Tensor | None
    initial_TH: torch.Tensor | None
    weight_VH: torch.Tensor
    teacher_weight_VH: torch.Tensor
    initial_weight_VH: torch.Tensor
    dtype: torch.dtype
    token_weight_T: torch.Tensor | None
    token_ids_T: torch.Tensor | None
    token_temperature: float
    lengths: tuple[int, ...]
    rollout_keys: Sequence[int] | None
    config: InterpolationLossConfig
    vocab: VocabAxis


class Statistics(NamedTuple):
    """Each token's statistics from the first collective.

    plain, mixed: the normalisers of the teacher's distribution and of the interpolated target, over the support if
    there is one. size_T: the entries of the support; plain_outside_T, mixed_outside_T: the mass outside it of the
    teacher's distribution and of the interpolation. All 0 without a support.
    """

    student_max_T: torch.Tensor
    student_sum_T: torch.Tensor
    plain_max_T: torch.Tensor
    plain_sum_T: torch.Tensor
    mixed_max_T: torch.Tensor
    mixed_sum_T: torch.Tensor
    student_entropy_T: torch.Tensor
    teacher_entropy_T: torch.Tensor
    token_logp_T: torch.Tensor
    size_T: torch.Tensor
    plain_outside_T: torch.Tensor
    mixed_outside_T: torch.Tensor

    def rows(self, rows: Rows) -> Statistics:
        return Statistics(*(values_T[rows] for values_T in self))

    @property
    def student(self) -> Softmax:
        return Softmax(self.student_max_T, self.student_sum_T)

    def target(self, selected_T: torch.Tensor) -> Softmax:
        return Softmax(
            torch.where(selected_T, self.mixed_max_T, self.plain_max_T),
            torch.where(selected_T, self.mixed_sum_T, self.plain_sum_T),
        )


class FirstVisit(NamedTuple):
    """A chunk whose statistics are being gathered; gathered() waits for those of all ranks [R, T, K]."""

    chunk: Chunk
    logits: ChunkLogits
    gathered: Callable[[], torch.Tensor]


class FusedPass:
    """One call of the fused loss: reads its inputs and fills the gradient (None: only values)."""

    def __init__(
        self, inputs: Inputs, size: ChunkSize, passes: Passes, gradient: OutputLayerGradient | None, *, overlap: bool
    ) -> None:
        """overlap: keep the logits of two chunks at a time, so that no product waits for a collective."""
        self.inputs, self.size, self.passes, self.gradient = inputs, size, passes, gradient
        self.overlap = overlap
        self.config = inputs.config
        self.token_ratio = inputs.config.temperature / inputs.token_temperature
        self.device = inputs.student_TH.device
        self.blind_T = select_blindly(
            lengths=inputs.lengths, config=inputs.config, rollout_keys=inputs.rollout_keys, device=self.device
        )
        made = {
            "most_rows": min(size.tokens, len(inputs.student_TH)),
            "scale": 1.0 if passes.divides_by_temperature else inverse(inputs.config.temperature, inputs.dtype),
            "buffers": 2 if overlap else 1,
        }
        self.project_student = Projection(inputs.weight_VH, inputs.dtype, **made)
        self.project_teacher = Projection(inputs.teacher_weight_VH, inputs.dtype, **made)
        self.project_full_teacher = Projection(inputs.teacher_weight_VH, inputs.dtype, **made)
        self.project_initial = Projection(inputs.initial_weight_VH, inputs.dtype, **made)
        # What every token of a rollout that does not fit into one chunk is treated as at first: the more frequent case.
        self.guess = inputs.config.fraction > 0.5

    def run(self) -> InterpolationOutput:
        """Processes all chunks, then the rows whose guess was wrong."""
        by_rollout = self.blind_T is None and self.config.positions == "top_fraction"
        size = self.size
        chunks = plan_chunks(self.inputs.lengths, size.tokens, whole_rollouts=by_rollout, together=size.together)
        if not chunks:
            return self._output(*self._empty())
        statistics_of, outcome_of, selected_of = zip(*self._first_visits(chunks), strict=True)
        statistics = Statistics(*map(torch.cat, zip(*statistics_of, strict=True)))
        outcome = Outcome(*map(torch.cat, zip(*outcome_of, strict=True)))
        selected_T = torch.cat(selected_of)
        if any(chunk.lengths is None for chunk in chunks):
            selected_T = self._correct_guesses(statistics, outcome, selected_T)
        return self._output(statistics, outcome, selected_T)

    def _first_visits(self, chunks: Sequence[Chunk]) -> list[tuple[Statistics, Outcome, torch.Tensor]]:
        """Statistics, outcome and selection of each chunk; fills the gradient."""
        found = []
        visit = self._start_visit(chunks[0])
        for following in (*chunks[1:], None):
            chunk = visit.chunk
            statistics = self._statistics(visit.gathered(), visit.logits.floor_T)
            selected_T = self._selected_in(chunk, statistics)
            work = self._sums(visit.logits, statistics, chunk.rows, selected_T)
            if self.overlap and following is not None:
                sums_TK, visit = self._sum_and_start_visit(work.sums_TK, following)
            else:
                sums_TK, visit = self.inputs.vocab.start_sum(work.sums_TK)(), None
            outcome = finish(sums_TK, self.config)
            if self.gradient is not None:
                self._put_gradient(chunk, work, outcome, selected_T)
            del work
            if following is not None and visit is None:
                visit = self._start_visit(following)
            found.append((statistics, outcome, selected_T))
        return found

    def _sum_and_start_visit(self, sums_TK: torch.Tensor, following: Chunk) -> tuple[torch.Tensor, FirstVisit]:
        """The sums over all ranks; the collective overlaps with the following chunk's products.

        With a support the following chunk's statistics need a maximum over all ranks, which joins this collective.
        """
        vocab = self.inputs.vocab
        if not self.config.supports:
            summed = vocab.start_sum(sums_TK)
            visit = self._start_visit(following)
            return summed(), visit
        deciding_TV = self._deciding_logits(following.rows)
        gathered = vocab.start_gather(torch.cat((sums_TK.flatten(), _highest(deciding_TV))))
        logits = self._logits(following.rows, deciding_TV)
        packed_RP = gathered()
        highest_T = packed_RP[:, sums_TK.numel() :].amax(0)
        visit = self._start_visit(following, logits, highest_T)
        return packed_RP[:, : sums_TK.numel()].sum(0).view_as(sums_TK), visit

    def _start_visit(
        self, chunk: Chunk, logits: ChunkLogits | None = None, highest_T: torch.Tensor | None = None
    ) -> FirstVisit:
        """Starts the collective of a chunk's statistics; highest_T: the largest deciding logit over all ranks."""
        logits = self._logits(chunk.rows) if logits is None else logits
        if self.config.supports:
            if highest_T is None:
                highest_T = self.inputs.vocab.max_shards(_highest(logits.deciding_TV))
            self._set_floor(logits, highest_T)
        query = None
        if self.inputs.token_ids_T is not None:
            columns = self.inputs.weight_VH.shape[0]
            ids_T = self.inputs.token_ids_T[chunk.rows]
            query = query_tokens(ids_T, start=self.inputs.vocab.start, columns=columns, ratio=self.token_ratio)
        packed_TK = self.passes.statistics(logits, query)
        return FirstVisit(chunk, logits, self.inputs.vocab.start_gather(packed_TK))

    def _set_floor(self, logits: ChunkLogits, highest_T: torch.Tensor) -> None:
        """highest_T: the largest deciding logit over all ranks, in the units of the logits."""
        if self.passes.divides_by_temperature:
            highest_T = highest_T * inverse(self.config.temperature, self.inputs.dtype)
        logits.floor_T = support_floor(highest_T, self.config.support_ratio)

    def _put_gradient(self, chunk: Chunk, work: Work, outcome: Outcome, selected_T: torch.Tensor) -> None:
        scale_T = self._gradient_scale(chunk.rows, selected_T) * outcome.factor_T
        dlogits_TV = self.passes.gradient(work, outcome.coefficient_T, scale_T)
        rows: Rows = chunk.rows
        if self.config.elsewhere == "skip":
            kept = selected_T.nonzero().squeeze(1)
            if len(kept) < len(selected_T):
                rows, dlogits_TV = kept + chunk.start, dlogits_TV[kept]
        self.gradient.put(rows, dlogits_TV)

    def _correct_guesses(self, statistics: Statistics, outcome: Outcome, guessed_T: torch.Tensor) -> torch.Tensor:
        """The correct selection; replaces outcome and gradient of the rows whose guess was wrong."""
        selected_T = select_positions(
            statistics.student_entropy_T,
            statistics.teacher_entropy_T,
            lengths=self.inputs.lengths,
            config=self.config,
        )
        if self._selection_matters():
            wrong_rows = (selected_T != guessed_T).nonzero().squeeze(1)
            # A quarter of a chunk's rows: logits, copies, wrong and correct gradient exist at the same time.
            for rows in wrong_rows.split(max(1, self.size.tokens // 4)):
                if rows.numel():
                    self._second_visit(rows, statistics.rows(rows), outcome)
        return selected_T

    def _second_visit(self, rows: torch.Tensor, statistics: Statistics, outcome: Outcome) -> None:
        """Replaces the outcome and the gradient of rows that all had the wrong guess."""
        logits = self._logits(rows)
        if self.config.supports:
            # A product of other rows can round differently. With a ratio of 1 the old floor could be above every entry.
            self._set_floor(logits, self.inputs.vocab.max_shards(_highest(logits.deciding_TV)))
        guess_T = torch.full(rows.shape, self.guess, device=self.device)
        guess_had_loss = self.guess or self.config.elsewhere == "teacher"
        replaced_TV = None
        if self.gradient is not None and self.gradient.weight is not None and guess_had_loss:
            work = self._sums(self.passes.copy(logits), statistics, rows, guess_T)
            scale_T = self._gradient_scale(rows, guess_T) * outcome.factor_T[rows]
            replaced_TV = self.passes.gradient(work, outcome.coefficient_T[rows], scale_T)
        work = self._sums(logits, statistics, rows, ~guess_T)
        correct = finish(self.inputs.vocab.sum_in_place(work.sums_TK), self.config)
        for stored_T, correct_T in zip(outcome, correct, strict=True):
            stored_T[rows] = correct_T
        if self.gradient is not None:
            scale_T = self._gradient_scale(rows, ~guess_T) * correct.factor_T
            dlogits_TV = self.passes.gradient(work, correct.coefficient_T, scale_T)
            self.gradient.put(rows, dlogits_TV, replaced_TV)

    def _deciding_logits(self, rows: Rows) -> torch.Tensor | None:
        """The logits that decide the support; None without one."""
        if not self.config.supports:
            return None
        if self.config.support == "student":
            return self.project_student(self.inputs.student_TH[rows])
        return self.project_initial(self.inputs.initial_TH[rows])

    def _logits(self, rows: Rows, deciding_TV: torch.Tensor | None = None) -> ChunkLogits:
        """The logits of these rows; deciding_TV: a result of _deciding_logits that is not computed again."""
        inputs, config = self.inputs, self.config
        deciding_TV = self._deciding_logits(rows) if deciding_TV is None else deciding_TV
        student_TV = deciding_TV if config.support == "student" else self.project_student(inputs.student_TH[rows])
        teacher_TV = self.project_teacher(inputs.teacher_TH[rows])
        partner_TV = None
        if config.interpolates and config.partner == "full_teacher":
            partner_TV = self.project_full_teacher(inputs.full_teacher_TH[rows])
        elif config.interpolates and config.partner == "initial":
            decides = config.support == "initial"
            partner_TV = deciding_TV if decides else self.project_initial(inputs.initial_TH[rows])
        return ChunkLogits(student_TV=student_TV, teacher_TV=teacher_TV, partner_TV=partner_TV, deciding_TV=deciding_TV)

    def _statistics(self, packed_RTK: torch.Tensor, floor_T: torch.Tensor | None) -> Statistics:
        """Every rank's statistics of its columns, merged."""
        parts = split_statistics(
            packed_RTK,
            support=self.config.supports,
            mixed=self.config.interpolates,
            token=self.inputs.token_ids_T is not None,
        )
        student = merge_softmax(parts.student[..., 0], parts.student[..., 1])
        teacher = merge_softmax(parts.teacher[..., 0], parts.teacher[..., 1])
        plain = teacher if parts.support is None else merge_softmax(parts.support[..., 0], parts.support[..., 1])
        mixed = plain if parts.mixed is None else merge_softmax(*parts.mixed.unbind(-1))
        none_T = torch.zeros_like(student.max_T)
        plain_outside_T = none_T if parts.support is None else outside_mass(plain, teacher)
        mixed_outside_T = plain_outside_T
        if parts.uncut is not None:
            mixed_outside_T = outside_mass(mixed, merge_softmax(*parts.uncut.unbind(-1)))
        if floor_T is not None:
            # A floor that is not finite would compare as false everywhere; the loss must not be finite either.
            plain, mixed = (Softmax(part.max_T, part.sum_T + 0.0 * floor_T) for part in (plain, mixed))
        token_logp_T = none_T
        if parts.token is not None:
            token_logp_T = merge_token_logp(parts.token, parts.student[..., 0], student, self.token_ratio)
        return Statistics(
            *student,
            *plain,
            *mixed,
            student_entropy_T=merge_entropy(parts.student, student),
            teacher_entropy_T=merge_entropy(parts.teacher, teacher),
            token_logp_T=token_logp_T,
            size_T=none_T if parts.support is None else parts.support[..., 2].sum(0),
            plain_outside_T=plain_outside_T,
            mixed_outside_T=mixed_outside_T,
        )

    def _selected_in(self, chunk: Chunk, statistics: Statistics) -> torch.Tensor:
        if self.blind_T is not None:
            return self.blind_T[chunk.rows]
        if chunk.lengths is None:
            return torch.full((chunk.stop - chunk.start,), self.guess, device=self.device)
        return select_positions(
            statistics.student_entropy_T, statistics.teacher_entropy_T, lengths=chunk.lengths, config=self.config
        )

    def _sums(self, logits: ChunkLogits, statistics: Statistics, rows: Rows, selected_T: torch.Tensor) -> Work:
        """This rank's part of the divergences of these rows, and the inputs of their gradient."""
        weight_T = selected_T.to(self.inputs.dtype) * self.config.target_weight
        target = Target(student=statistics.student, target=statistics.target(selected_T), weight_T=weight_T)
        scale_T = None if self.gradient is None else self._gradient_scale(rows, selected_T)
        return self.passes.sums(logits, target, scale_T)

    def _loss_scale(self, rows: Rows, selected_T: torch.Tensor) -> torch.Tensor:
        """The factor of each token's divergence: its weight times the control's factor; 0 if it carries no loss."""
        scale_T = torch.ones(selected_T.shape, dtype=self.inputs.dtype, device=self.device)
        scale_T = torch.where(selected_T, scale_T * self.config.selected_loss_factor, scale_T)
        if self.inputs.token_weight_T is not None:
            scale_T = scale_T * self.inputs.token_weight_T[rows].to(scale_T.dtype)
        return torch.where(self._carries_loss(selected_T), scale_T, 0.0)

    def _gradient_scale(self, rows: Rows, selected_T: torch.Tensor) -> torch.Tensor:
        return self._loss_scale(rows, selected_T) / self.config.temperature

    def _carries_loss(self, selected_T: torch.Tensor) -> torch.Tensor:
        return selected_T if self.config.elsewhere == "skip" else torch.ones_like(selected_T)

    def _selection_matters(self) -> bool:
        """Whether values or gradients depend on which positions are selected."""
        if self.config.interpolates:
            return True
        reweights = self.config.selected_loss_factor != 1.0 or self.config.elsewhere == "skip"
        return self.gradient is not None and reweights

    def _empty(self) -> tuple[Statistics, Outcome, torch.Tensor]:
        empty_T = torch.zeros(0, dtype=self.inputs.dtype, device=self.device)
        statistics = Statistics(*[empty_T] * len(Statistics._fields))
        return statistics, Outcome(*[empty_T] * len(Outcome._fields)), empty_T.bool()

    def _output(self, statistics: Statistics, outcome: Outcome, selected_T: torch.Tensor) -> InterpolationOutput:
        scale_T = self._loss_scale(slice(None), selected_T)
        outside_T = torch.where(selected_T, statistics.mixed_outside_T, statistics.plain_outside_T)
        return InterpolationOutput(
            loss_T=torch.where(scale_T == 0.0, 0.0, outcome.loss_T * scale_T),
            student_entropy_T=statistics.student_entropy_T,
            teacher_entropy_T=statistics.teacher_entropy_T,
            selected_T=selected_T,
            divergence_T=outcome.divergence_T,
            clipped_share_T=outcome.clipped_share_T,
            clipped_entries_T=outcome.clipped_entries_T.round().long(),
            carries_loss_T=self._carries_loss(selected_T),
            token_logp_T=statistics.token_logp_T if self.inputs.token_ids_T is not None else None,
            outside_mass_T=outside_T if self.config.supports else None,
            support_size_T=statistics.size_T.round().long() if self.config.supports else None,
        )


def _highest(logits_TV: torch.Tensor) -> torch.Tensor:
    """The largest logit [T] of this rank's columns."""
    return logits_TV.amax(1) if logits_TV.shape[1] else logits_TV.new_full((len(logits_TV),), EMPTY_MAX)
