"""The losses of the objectives, as the policy calls them: on the response rows of one micro-batch."""

from dataclasses import dataclass

import torch

from megatron_paint.keys import derive_key
from megatron_paint.losses import InterpolationLossConfig, LossOutput, fused_interpolation_loss, token_logprobs
from megatron_paint.losses.config import Kernel
from megatron_paint.policy import ResponseRows


@dataclass(frozen=True, kw_only=True)
class DistillationLoss:
    """The vocabulary-parallel sparse interpolation loss towards the teacher's distribution (PAINT and OPSD)."""

    config: InterpolationLossConfig
    chunk_bytes: float
    token_temperature: float  # at which the sampler's log-probabilities were taken
    kernel: Kernel = "auto"

    needs_teacher = True

    @property
    def needs_full_teacher(self) -> bool:
        return self.config.partner == "full_teacher"

    def __call__(self, rows: ResponseRows) -> LossOutput:
        return fused_interpolation_loss(
            rows.student_hidden_NH,
            rows.output_weight_VH,
            rows.teacher_hidden_NH,
            lengths=rows.lengths,
            config=self.config,
            vocab=rows.vocab,
            chunk_bytes=self.chunk_bytes,
            teacher_output_weight_VH=rows.teacher_output_weight_VH,
            full_teacher_hidden_TH=rows.full_teacher_hidden_NH,
            # The rollout's own draws come from its key itself: positions drawn from it would be those of its draws.
            rollout_keys=[derive_key(key, "positions") for key in rows.keys],
            token_ids_T=rows.token_ids_N,
            token_temperature=self.token_temperature,
            kernel=self.kernel,
        )


@dataclass(frozen=True, kw_only=True)
class CrossEntropyLoss:
    """Minus the log-probability of each response token (SFT)."""

    chunk_bytes: float
    kernel: Kernel = "auto"

    needs_teacher = False
    needs_full_teacher = False

    def __call__(self, rows: ResponseRows) -> LossOutput:
        scored = token_logprobs(
            rows.student_hidden_NH,
            rows.output_weight_VH,
            rows.token_ids_N,
            vocab=rows.vocab,
            chunk_bytes=self.chunk_bytes,
            # With weights the gradient is formed in the forward pass: one product with the output layer fewer.
            token_weight_T=torch.ones_like(rows.token_ids_N, dtype=torch.float32),
            kernel=self.kernel,
        )
        nothing = torch.zeros_like(scored.entropy_T)
        everywhere = torch.ones_like(nothing, dtype=torch.bool)
        return LossOutput(
            loss_T=-scored.logp_T,
            student_entropy_T=scored.entropy_T,
            teacher_entropy_T=nothing,
            selected_T=~everywhere,
            divergence_T=-scored.logp_T.detach(),
            clipped_share_T=nothing,
            clipped_entries_T=nothing.long(),
            carries_loss_T=everywhere,
            token_logp_T=scored.logp_T.detach(),
        )
