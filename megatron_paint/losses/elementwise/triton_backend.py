"""The elementwise work on a chunk of logits in Triton: one read for the statistics, one read and one write for dz.

A plain forward KL computes its sums and its gradient in one pass. The gradients of the other divergences first need
their sums over the complete vocabulary, which costs one more read of the logits and no more memory.
Axes: T tokens, V this rank's vocabulary columns, K packed statistics or sums.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from megatron_paint.config.loss import InterpolationLossConfig
from megatron_paint.losses.elementwise.divergences import coefficient_is_one, divergence_of
from megatron_paint.losses.elementwise.interface import ChunkLogits, Target, Work
from megatron_paint.losses.elementwise.softmax_statistics import Softmax, TokenQuery, token_logits
from megatron_paint.losses.elementwise.token import TokenLogits
from megatron_paint.losses.elementwise.triton_kernels import (
    divergence_kernel,
    statistics_kernel,
    token_gradient_kernel,
    token_statistics_kernel,
)
from megatron_paint.losses.output_layer.products import inverse

# Lanes of a program: 8 values a thread at 8 warps, which keeps every running value in registers.
_BLOCK = 2048
_WARPS = 8


class TritonPasses:
    """Implements `interface.Passes`; dlogits_dtype: the type in which the gradient enters its products."""

    divides_by_temperature = True

    def __init__(self, config: InterpolationLossConfig, *, dlogits_dtype: torch.dtype, block: int = _BLOCK) -> None:
        self.config, self.dlogits_dtype, self.block = config, dlogits_dtype, block
        self.divergence = divergence_of(config)
        self.factor = inverse(config.temperature, torch.float32)

    def statistics(self, logits: ChunkLogits, query: TokenQuery | None) -> torch.Tensor:
        """[T, K], in the order of split_statistics."""
        student_TV = logits.student_TV
        mixed, heated = self.config.interpolates, query is not None and query.ratio != 1.0
        packed_TK = student_TV.new_empty((len(student_TV), 14), dtype=torch.float32)
        if len(student_TV):
            statistics_kernel[(len(student_TV),)](
                *_pointers(logits),
                packed_TK if logits.floor_T is None else logits.floor_T,
                packed_TK,
                student_TV.stride(0),
                student_TV.shape[1],
                self.factor,
                self.config.target_weight,
                query.ratio if heated else 1.0,
                MIXED=mixed,
                FULL_TEACHER=logits.partner_TV is not None,
                SUPPORT=self.config.supports,
                HEATED=heated,
                BLOCK=self.block,
                num_warps=_WARPS,
            )
        parts = [packed_TK[:, :6], packed_TK[:, 9:12]] if self.config.supports else [packed_TK[:, :6]]
        if mixed:
            parts += [packed_TK[:, 6:8], packed_TK[:, 12:14]] if self.config.supports else [packed_TK[:, 6:8]]
        if query is not None:
            logit_T = packed_TK.new_zeros(len(packed_TK))
            if student_TV.shape[1]:
                logit_T = token_logits(student_TV, query).float() * self.factor
            parts += [logit_T[:, None], packed_TK[:, 8:9] if heated else packed_TK.new_zeros((len(packed_TK), 1))]
        return torch.cat(parts, dim=1)

    def sums(self, logits: ChunkLogits, target: Target, scale_T: torch.Tensor | None) -> Work:
        """This rank's part of the sums, and the gradient if it does not need them."""
        sums_TK = logits.student_TV.new_empty((len(logits.student_TV), 5), dtype=torch.float32)
        dlogits_TV = None
        if scale_T is not None and coefficient_is_one(self.config):
            dlogits_TV = self._buffer(logits)
        self._run(logits, target, None, scale_T, sums_TK=sums_TK, dlogits_TV=dlogits_TV)
        # Contiguous: a collective would sum other memory of a view.
        return Work(sums_TK[:, : self.divergence.sums(self.config)].contiguous(), logits, target, dlogits_TV)

    def gradient(self, work: Work, coefficient_T: torch.Tensor, scale_T: torch.Tensor) -> torch.Tensor:
        """scale (c p - B) [T, V], in the teacher's buffer if the types are equal."""
        if work.dlogits_TV is not None:
            return work.dlogits_TV
        dlogits_TV = self._buffer(work.logits)
        self._run(work.logits, work.target, coefficient_T, scale_T, sums_TK=None, dlogits_TV=dlogits_TV)
        return dlogits_TV

    def copy(self, logits: ChunkLogits) -> ChunkLogits:
        """Logits are only read, except the teacher's if the gradient overwrites them."""
        overwrites = logits.teacher_TV.dtype == self.dlogits_dtype
        return replace(logits, teacher_TV=logits.teacher_TV.clone()) if overwrites else logits

    def _buffer(self, logits: ChunkLogits) -> torch.Tensor:
        if logits.teacher_TV.dtype == self.dlogits_dtype:
            return logits.teacher_TV
        return torch.empty_like(logits.teacher_TV, dtype=self.dlogits_dtype)

    def _run(
        self,
        logits: ChunkLogits,
        target: Target,
        coefficient_T: torch.Tensor | None,
        scale_T: torch.Tensor | None,
        *,
        sums_TK: torch.Tensor | None,
        dlogits_TV: torch.Tensor | None,
    ) -> None:
        student_TV, config = logits.student_TV, self.config
        if not len(student_TV):
            return
        one_T = torch.ones_like(target.weight_T)
        columns = (target.student.max_T, target.student.sum_T.log(), target.target.max_T, target.target.sum_T.log())
        columns += (target.weight_T,)
        columns += tuple(one_T if part is None else part for part in (coefficient_T, scale_T, logits.floor_T))
        normalisers_TK = torch.stack([column_T.float() for column_T in columns], dim=1)
        divergence_kernel[(len(student_TV),)](
            *_pointers(logits),
            normalisers_TK,
            normalisers_TK if sums_TK is None else sums_TK,
            student_TV if dlogits_TV is None else dlogits_TV,
            student_TV.stride(0),
            student_TV.stride(0) if dlogits_TV is None else dlogits_TV.stride(0),
            student_TV.shape[1],
            self.factor,
            float(config.clip or 0.0),
            float(config.jsd_beta),
            1.0 - config.jsd_beta,
            DIVERGENCE=config.divergence,
            CLIPPED=config.clips_entries,
            MIXED=config.interpolates,
            FULL_TEACHER=logits.partner_TV is not None,
            SUPPORT=config.supports,
            SUMS=sums_TK is not None,
            GRADIENT=dlogits_TV is not None,
            BLOCK=self.block,
            num_warps=_WARPS,
        )


class TritonTokenPasses:
    """Implements `token.TokenPasses`; dlogits_dtype: the type in which the gradient enters its products."""

    def __init__(self, *, dlogits_dtype: torch.dtype, block: int = _BLOCK) -> None:
        self.dlogits_dtype, self.block = dlogits_dtype, block

    def statistics(self, logits: TokenLogits, query: TokenQuery) -> torch.Tensor:
        values_TV = logits.values_TV
        packed_TK = values_TV.new_empty((len(values_TV), 3), dtype=torch.float32)
        logit_T = packed_TK.new_zeros(len(packed_TK))
        if len(values_TV):
            token_statistics_kernel[(len(values_TV),)](
                values_TV, packed_TK, values_TV.stride(0), values_TV.shape[1], BLOCK=self.block, num_warps=_WARPS
            )
        if values_TV.shape[1]:
            logit_T = token_logits(values_TV, query).float()
        return torch.cat((packed_TK, logit_T[:, None]), dim=1)

    def gradient(self, logits: TokenLogits, query: TokenQuery, total: Softmax, scale_T: torch.Tensor) -> torch.Tensor:
        """In the logits' buffer if the types are equal."""
        values_TV = dlogits_TV = logits.values_TV
        if values_TV.dtype != self.dlogits_dtype:
            dlogits_TV = torch.empty_like(values_TV, dtype=self.dlogits_dtype)
        if len(values_TV):
            given_TK = torch.stack([total.max_T, total.sum_T.log(), scale_T.float()], dim=1)
            token_gradient_kernel[(len(values_TV),)](
                values_TV,
                torch.where(query.here_T, query.column_T, -1),
                given_TK,
                dlogits_TV,
                values_TV.stride(0),
                dlogits_TV.stride(0),
                values_TV.shape[1],
                BLOCK=self.block,
                num_warps=_WARPS,
            )
        return dlogits_TV


def _pointers(logits: ChunkLogits) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The buffers; they have the same row stride, because the same kind of product made them."""
    student_TV = logits.student_TV
    partner_TV = student_TV if logits.partner_TV is None else logits.partner_TV
    deciding_TV = student_TV if logits.deciding_TV is None else logits.deciding_TV
    assert student_TV.stride() == logits.teacher_TV.stride() == partner_TV.stride() == deciding_TV.stride()
    return student_TV, logits.teacher_TV, partner_TV, deciding_TV
