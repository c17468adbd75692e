"""The losses of the objectives. The policy calls them with the response rows of one micro-batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_paint.base.keys import derive_key
from megatron_paint.config.loss import Kernel
from megatron_paint.config.objective import GrpoSettings
from megatron_paint.losses import (
    InterpolationLossConfig,
    LossOutput,
    TokenLogprobs,
    fused_interpolation_loss,
    token_logprobs,
)
from megatron_paint.losses.importance import prefix_weights
from megatron_paint.losses.interface import ResponseRows

# Sums of the losses without a sparse set, and the names of their values at single tokens.
KEPT_NAMES = {"divergence_other": "divergence", "student_entropy": "student_entropy"}


@dataclass(frozen=True, kw_only=True)
class DistillationLoss:
    """The vocabulary-parallel sparse interpolation loss towards the teacher's distribution (PAINT and OPSD).

    Responses that older weights have sampled (`Sample.old_logprobs`) get truncated importance weights, at the price of
    one more product with the output layer.
    Sums: student_entropy, teacher_entropy, divergence_selected, divergence_other, clipped_mass, clipped_entries; with a
    support outside_mass and support_size; with older weights importance, and importance_limited at the limit.
    """

    config: InterpolationLossConfig
    chunk_bytes: float
    token_temperature: float  # of the sampler's log-probabilities
    importance_limit: float | None = None  # largest weight of a token; None: no weights
    kernel: Kernel = "auto"

    needs_teacher = True
    keeps_logprobs = False

    @property
    def needs_full_teacher(self) -> bool:
        return self.config.partner == "full_teacher"

    @property
    def needs_initial(self) -> bool:
        return self.config.needs_initial

    def __call__(self, rows: ResponseRows) -> LossOutput:
        importance_N = self._importance(rows)
        output = fused_interpolation_loss(
            rows.student_hidden_NH,
            rows.output_weight_VH,
            rows.teacher_hidden_NH,
            lengths=rows.lengths,
            config=self.config,
            vocab=rows.vocab,
            chunk_bytes=self.chunk_bytes,
            teacher_output_weight_VH=rows.teacher_output_weight_VH,
            full_teacher_hidden_TH=rows.full_teacher_hidden_NH,
            initial_hidden_TH=rows.initial_hidden_NH,
            initial_output_weight_VH=rows.initial_output_weight_VH,
            # The rollout's tokens were drawn with the key itself; positions must not use the same random numbers.
            rollout_keys=[derive_key(sample.key, "positions") for sample in rows.samples],
            token_ids_T=rows.token_ids_N,
            token_temperature=self.token_temperature,
            token_weight_T=importance_N,
            kernel=self.kernel,
        )
        selected_T, carries_T = output.selected_T, output.carries_loss_T
        support = {}
        if self.config.supports:
            support = {"outside_mass": output.outside_mass_T, "support_size": output.support_size_T}
        importance = {}
        if importance_N is not None:
            importance = {"importance": importance_N, "importance_limited": importance_N >= self.importance_limit}
        return LossOutput(
            loss_T=output.loss_T,
            carries_loss_T=carries_T,
            selected_T=selected_T,
            token_logp_T=output.token_logp_T,
            sums={
                "student_entropy": output.student_entropy_T,
                "teacher_entropy": output.teacher_entropy_T,
                "divergence_selected": torch.where(selected_T, output.divergence_T, 0.0),
                "divergence_other": torch.where(selected_T, 0.0, output.divergence_T),
                "clipped_mass": torch.where(carries_T, output.clipped_share_T, 0.0),
                "clipped_entries": torch.where(carries_T, output.clipped_entries_T, 0),
                **support,
                **importance,
            },
            per_token=support,
            kept={
                "divergence": output.divergence_T,
                "student_entropy": output.student_entropy_T,
                "teacher_entropy": output.teacher_entropy_T,
            },
        )

    def _importance(self, rows: ResponseRows) -> torch.Tensor | None:
        """The weight [N] of each token; 1 in responses of the current weights. None: no response is of older ones."""
        if self.importance_limit is None or all(sample.old_logprobs is None for sample in rows.samples):
            return None
        with torch.no_grad():
            logp_N = token_logprobs(
                rows.student_hidden_NH,
                rows.output_weight_VH,
                rows.token_ids_N,
                vocab=rows.vocab,
                temperature=self.token_temperature,
                chunk_bytes=self.chunk_bytes,
                kernel=self.kernel,
            ).logp_T
        return prefix_weights(logp_N, _old_logprobs(rows, logp_N), rows.lengths, limit=self.importance_limit)


@dataclass(frozen=True, kw_only=True)
class CrossEntropyLoss:
    """Minus the log-probability of each response token (SFT).

    Sums: student_entropy, and divergence_other, which is the loss: the divergence to a target of one token.
    """

    chunk_bytes: float
    kernel: Kernel = "auto"

    needs_teacher = False
    needs_full_teacher = False
    needs_initial = False
    keeps_logprobs = False

    def __call__(self, rows: ResponseRows) -> LossOutput:
        scored = token_logprobs(
            rows.student_hidden_NH,
            rows.output_weight_VH,
            rows.token_ids_N,
            vocab=rows.vocab,
            chunk_bytes=self.chunk_bytes,
            # With weights the forward pass computes the gradient, which saves one product with the output layer.
            token_weight_T=torch.ones_like(rows.token_ids_N, dtype=torch.float32),
            kernel=self.kernel,
        )
        sums = {"student_entropy": scored.entropy_T, "divergence_other": -scored.logp_T.detach()}
        return _on_all_tokens(-scored.logp_T, logp_T=scored.logp_T, sums=sums)


@dataclass(frozen=True, kw_only=True)
class PolicyGradientLoss:
    """The clipped policy gradient of GRPO on each response token, at the temperature of the rollout.

    -w min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) + kl_weight k3, times the sample's weight. rho: the token's
    probability divided by its probability before the step's first update, or under older weights that sampled it
    (`Sample.old_logprobs`); w = min(that probability / the sampler's, importance_limit), without a gradient; k3 =
    exp(d) - d - 1, d = log p_reference - log p: an unbiased estimate of the KL to the reference, never negative.
    Sums: student_entropy; clipped_ratios, tokens whose gradient the clip stops; with a kl_weight divergence_other, k3.
    """

    settings: GrpoSettings
    chunk_bytes: float
    temperature: float
    kernel: Kernel = "auto"

    needs_full_teacher = False
    needs_initial = False

    @property
    def needs_teacher(self) -> bool:
        return self.settings.kl_weight > 0

    @property
    def keeps_logprobs(self) -> bool:
        return self.settings.updates_per_batch > 1

    def __call__(self, rows: ResponseRows) -> LossOutput:
        settings = self.settings
        scored = self._score(rows, rows.student_hidden_NH, rows.output_weight_VH)
        logp_N = scored.logp_T
        advantage_N = _spread(rows, [sample.advantage for sample in rows.samples], like=logp_N)
        old_N = _old_logprobs(rows, logp_N)
        ratio_N = (logp_N - old_N).exp()
        cut_N = ratio_N.clamp(1.0 - settings.clip_low, 1.0 + settings.clip_high)
        loss_N = -torch.minimum(ratio_N * advantage_N, cut_N * advantage_N)
        clipped_N = (cut_N * advantage_N).detach() < (ratio_N * advantage_N).detach()
        if settings.importance_limit is not None and rows.samples:
            sampler_N = _joined([sample.rollout.logprobs for sample in rows.samples], like=logp_N)
            loss_N = loss_N * (old_N - sampler_N).exp().clamp(max=settings.importance_limit)
        sums = {"student_entropy": scored.entropy_T, "clipped_ratios": clipped_N}
        if self.needs_teacher:
            weight_VH = rows.teacher_output_weight_VH
            with torch.no_grad():
                reference = self._score(
                    rows, rows.teacher_hidden_NH, rows.output_weight_VH if weight_VH is None else weight_VH
                )
            d_N = reference.logp_T - logp_N
            k3_N = torch.expm1(d_N) - d_N
            loss_N = loss_N + settings.kl_weight * k3_N
            sums["divergence_other"] = k3_N.detach()
        loss_N = loss_N * _spread(rows, [sample.weight for sample in rows.samples], like=logp_N)
        return _on_all_tokens(loss_N, logp_T=logp_N, sums=sums)

    def _score(self, rows: ResponseRows, hidden_NH: torch.Tensor, weight_VH: torch.Tensor) -> TokenLogprobs:
        return token_logprobs(
            hidden_NH,
            weight_VH,
            rows.token_ids_N,
            vocab=rows.vocab,
            temperature=self.temperature,
            chunk_bytes=self.chunk_bytes,
            kernel=self.kernel,
        )


def _old_logprobs(rows: ResponseRows, logp_N: torch.Tensor) -> torch.Tensor:
    """`Sample.old_logprobs` of all tokens [N], without a gradient; logp_N where a sample has none."""
    parts = zip(rows.samples, logp_N.detach().split(list(rows.lengths)), strict=True)
    old = [now_T if s.old_logprobs is None else _joined([s.old_logprobs], like=logp_N) for s, now_T in parts]
    return torch.cat(old) if old else logp_N.detach()


def _spread(rows: ResponseRows, values: Sequence[float], *, like: torch.Tensor) -> torch.Tensor:
    """One value per sample, repeated at each of its tokens [N]."""
    value_S = torch.tensor(values, dtype=like.dtype, device=like.device)
    return value_S.repeat_interleave(torch.tensor(rows.lengths, dtype=torch.int64, device=like.device))


def _joined(values: Sequence[Sequence[float]], *, like: torch.Tensor) -> torch.Tensor:
    """The values of all samples' tokens [N]."""
    return torch.tensor([value for part in values for value in part], dtype=like.dtype, device=like.device)


def _on_all_tokens(loss_T: torch.Tensor, *, logp_T: torch.Tensor, sums: dict[str, torch.Tensor]) -> LossOutput:
    """A loss at all tokens, without a sparse set."""
    everywhere_T = torch.ones_like(loss_T, dtype=torch.bool)
    return LossOutput(
        loss_T=loss_T,
        carries_loss_T=everywhere_T,
        selected_T=~everywhere_T,
        token_logp_T=logp_T.detach(),
        sums=sums,
        kept={KEPT_NAMES[name]: sums[name] for name in KEPT_NAMES if name in sums},
    )
