"""The passes over chunks of logits behind fused_interpolation_loss.

Per chunk: two matrix products compute the student's and the teacher's logits. One collective merges softmax statistics
and entropies, which determine the selection; a second one merges the divergences. Then dlogits W and dlogits^T h.
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
    Softmax,
    merge_entropy,
    merge_softmax,
    merge_token_logp,
    query_tokens,
)
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
    weight_VH: torch.Tensor
    teacher_weight_VH: torch.Tensor
    dtype: torch.dtype
    token_weight_T: torch.Tensor | None
    token_ids_T: torch.Tensor | None
    token_temperature: float
    lengths: tuple[int, ...]
    rollout_keys: Sequence[int] | None
    config: InterpolationLossConfig
    vocab: VocabAxis


class Statistics(NamedTuple):
    """Each token's statistics from the first collective; mixed: the normaliser of the interpolated target."""

    student_max_T: torch.Tensor
    student_sum_T: torch.Tensor
    teacher_max_T: torch.Tensor
    teacher_sum_T: torch.Tensor
    mixed_max_T: torch.Tensor
    mixed_sum_T: torch.Tensor
    student_entropy_T: torch.Tensor
    teacher_entropy_T: torch.Tensor
    token_logp_T: torch.Tensor

    def rows(self, rows: Rows) -> Statistics:
        return Statistics(*(values_T[rows] for values_T in self))

    @property
    def student(self) -> Softmax:
        return Softmax(self.student_max_T, self.student_sum_T)

    def target(self, selected_T: torch.Tensor) -> Softmax:
        return Softmax(
            torch.where(selected_T, self.mixed_max_T, self.teacher_max_T),
            torch.where(selected_T, self.mixed_sum_T, self.teacher_sum_T),
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
        # What every token of a rollout that does not fit into one chunk is treated as at first: the more frequent case.
        self.guess = inputs.config.fraction > 0.5

    def run(self) -> InterpolationOutput:
        """Processes all chunks, then the rows whose guess was wrong."""
        by_rollout = self.blind_T is None and self.config.positions == "top_fraction"
        chunks = plan_chunks(self.inputs.lengths, self.size.tokens, whole_rollouts=by_rollout)
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
        visit: FirstVisit | None = self._start_visit(chunks[0])
        for following in (*chunks[1:], None):
            chunk = visit.chunk
            statistics = self._statistics(visit.gathered())
            selected_T = self._selected_in(chunk, statistics)
            work = self._sums(visit.logits, statistics, chunk.rows, selected_T)
            summed = self.inputs.vocab.start_sum(work.sums_TK)
            visit = self._start_visit(following) if following is not None and self.overlap else None
            outcome = finish(summed(), self.config)
            if self.gradient is not None:
                self._put_gradient(chunk, work, outcome, selected_T)
            del work
            if following is not None and visit is None:
                visit = self._start_visit(following)
            found.append((statistics, outcome, selected_T))
        return found

    def _start_visit(self, chunk: Chunk) -> FirstVisit:
        logits = self._logits(chunk.rows)
        query = None
        if self.inputs.token_ids_T is not None:
            columns = self.inputs.weight_VH.shape[0]
            ids_T = self.inputs.token_ids_T[chunk.rows]
            query = query_tokens(ids_T, start=self.inputs.vocab.start, columns=columns, ratio=self.token_ratio)
        packed_TK = self.passes.statistics(logits, query)
        return FirstVisit(chunk, logits, self.inputs.vocab.start_gather(packed_TK))

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

    def _logits(self, rows: Rows) -> ChunkLogits:
        inputs = self.inputs
        student_TV = self.project_student(inputs.student_TH[rows])
        teacher_TV = self.project_teacher(inputs.teacher_TH[rows])
        partner_TV = None
        if inputs.full_teacher_TH is not None and self.config.interpolates:
            partner_TV = self.project_full_teacher(inputs.full_teacher_TH[rows])
        return ChunkLogits(student_TV=student_TV, teacher_TV=teacher_TV, partner_TV=partner_TV)

    def _statistics(self, packed_RTK: torch.Tensor) -> Statistics:
        """Every rank's statistics of its columns, merged."""
        parts = split_statistics(packed_RTK, mixed=self.config.interpolates, token=self.inputs.token_ids_T is not None)
        student = merge_softmax(parts.student[..., 0], parts.student[..., 1])
        teacher = merge_softmax(parts.teacher[..., 0], parts.teacher[..., 1])
        mixed = teacher if parts.mixed is None else merge_softmax(*parts.mixed.unbind(-1))
        token_logp_T = torch.zeros_like(student.max_T)
        if parts.token is not None:
            token_logp_T = merge_token_logp(parts.token, parts.student[..., 0], student, self.token_ratio)
        return Statistics(
            *student,
            *teacher,
            *mixed,
            student_entropy_T=merge_entropy(parts.student, student),
            teacher_entropy_T=merge_entropy(parts.teacher, teacher),
            token_logp_T=token_logp_T,
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
        )
