"""The interpolation loss from logits, in plain autograd: the reference for the fused loss.

Axes: T response tokens, V the vocabulary or this rank's columns of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_paint.config.loss import InterpolationLossConfig
from megatron_paint.losses import checks
from megatron_paint.losses.cpu_math import settle_cpu_math
from megatron_paint.losses.elementwise.divergences import divergence_of
from megatron_paint.losses.elementwise.support import support_floor
from megatron_paint.losses.output import InterpolationOutput
from megatron_paint.losses.selection import select_positions
from megatron_paint.losses.token_weights import token_weights
from megatron_paint.losses.vocab import VocabAxis, WholeVocab

# Replaces the logit -inf: its exponential is 0, and its differences and products remain finite.
_MASKED = -1e30
_WHOLE = WholeVocab()


def interpolation_loss(
    student_logits_TV: torch.Tensor,
    teacher_logits_TV: torch.Tensor,
    *,
    lengths: Sequence[int],
    config: InterpolationLossConfig,
    vocab: VocabAxis = _WHOLE,
    full_teacher_logits_TV: torch.Tensor | None = None,
    initial_logits_TV: torch.Tensor | None = None,
    rollout_keys: Sequence[int] | None = None,
    token_weight_T: torch.Tensor | None = None,
    token_ids_T: torch.Tensor | None = None,
    token_temperature: float | None = None,
) -> InterpolationOutput:
    """The divergence of each token's target and the student, and further measurements.

    Logits [T, V] before the temperature, any floating point type; -inf masks an entry. initial_logits_TV: those of the
    initial weights on the student's prompt, for support="initial" and partner="initial". lengths: tokens of each
    rollout, in row order. rollout_keys: one int per rollout, for positions="random". token_weight_T [T] multiplies
    loss_T, beside the weights of config.token_weight. token_ids_T [T], token_temperature (None: the loss temperature):
    for token_logp_T.
    Only student_logits_TV gets a gradient, and only as the student: not as a partner and not from measurements.
    Raises ValueError for arguments that do not fit together.
    """
    settle_cpu_math()
    _check_logits(student_logits_TV, teacher_logits_TV, full_teacher_logits_TV, initial_logits_TV, config, vocab)
    lengths = checks.checked_lengths(lengths, len(student_logits_TV))
    checks.check_vector("token_weight_T", token_weight_T, len(student_logits_TV))
    dtype = checks.compute_dtype(student_logits_TV, teacher_logits_TV, full_teacher_logits_TV, initial_logits_TV)
    axis = {"vocab": vocab, "dtype": dtype}
    student_TV = _energies(student_logits_TV, config.temperature, **axis)
    student_logp_TV = _log_softmax(student_TV, vocab)
    student_entropy_T = _entropy(student_logp_TV.detach(), vocab)
    with torch.no_grad():
        teacher_TV = _energies(teacher_logits_TV, config.temperature, **axis)
        others = {"student": student_logits_TV, "full_teacher": full_teacher_logits_TV, "initial": initial_logits_TV}
        partner_TV = _energies(others[config.partner], config.temperature, **axis)
        teacher_entropy_T = _entropy(_log_softmax(teacher_TV, vocab), vocab)
        selected_T = select_positions(
            student_entropy_T, teacher_entropy_T, lengths=lengths, config=config, rollout_keys=rollout_keys
        )
        weight_T = config.target_weight * selected_T.to(dtype)
        target_TV = torch.lerp(teacher_TV, partner_TV, weight_T[:, None])
        target_logp_TV = _log_softmax(target_TV, vocab)
        outside_mass_T = support_size_T = None
        if config.supports:
            deciding_TV = _energies(others[config.support], config.temperature, **axis)
            floor_T = support_floor(_highest(deciding_TV, vocab), config.support_ratio)
            outside_TV = deciding_TV < floor_T[:, None]
            outside_mass_T = vocab.sum_shards(torch.where(outside_TV, target_logp_TV.exp(), 0.0).sum(1))
            support_size_T = vocab.sum_shards((~outside_TV).sum(1))
            # A floor that is not finite compares as false; the loss must not be finite either.
            target_TV = target_TV.masked_fill(outside_TV, _MASKED) + 0.0 * floor_T[:, None]
            target_logp_TV = _log_softmax(target_TV, vocab)
        temperature = config.temperature if token_temperature is None else token_temperature
        token_logp_T = _token_logp(student_logits_TV, token_ids_T, temperature, **axis)
    terms_TV = divergence_of(config).reference(student_logp_TV, target_logp_TV, config)
    clipped_TV = _clipped(student_logp_TV, target_logp_TV, config)
    # A clipped term is the clip plus, as in kl_terms, p - q: over all terms those add up to 0.
    clip_TV = (config.clip or 0.0) + student_logp_TV.exp() - target_logp_TV.exp()
    carries_loss_T = selected_T if config.elsewhere == "skip" else torch.ones_like(selected_T)
    scale_T = carries_loss_T * (1.0 - (1.0 - config.selected_loss_factor) * selected_T.to(dtype))
    if token_weight_T is not None:
        scale_T = scale_T * token_weight_T.detach().to(dtype)
    loss_T = vocab.sum_shards(torch.where(clipped_TV, clip_TV, terms_TV).sum(1))
    divergence_T = loss_T.detach() if not config.clips_entries else vocab.sum_shards(terms_TV.detach().sum(1))
    clipped_share_T = vocab.sum_shards((target_logp_TV.exp() * clipped_TV).sum(1))
    clipped_entries_T = vocab.sum_shards(clipped_TV.sum(1))
    if config.clip is not None and config.clip_rule == "token":
        above_T = divergence_T > config.clip
        loss_T = torch.where(above_T, config.clip * (1.0 + (loss_T.clamp(min=config.clip) / config.clip).log()), loss_T)
        clipped_share_T = 1.0 - config.clip / divergence_T.clamp(min=config.clip)
        clipped_entries_T = above_T.long()
    scale_T = scale_T * token_weights(divergence_T, lengths, config, like=scale_T)
    return InterpolationOutput(
        loss_T=loss_T * scale_T,
        student_entropy_T=student_entropy_T,
        teacher_entropy_T=teacher_entropy_T,
        selected_T=selected_T,
        divergence_T=divergence_T,
        clipped_share_T=clipped_share_T,
        clipped_entries_T=clipped_entries_T,
        carries_loss_T=carries_loss_T,
        token_logp_T=token_logp_T,
        outside_mass_T=outside_mass_T,
        support_size_T=support_size_T,
    )


def _energies(logits_TV: torch.Tensor, temperature: float, *, vocab: VocabAxis, dtype: torch.dtype) -> torch.Tensor:
    """Logits divided by the temperature, without the padding columns."""
    logits_TV = logits_TV[:, : vocab.valid_columns(logits_TV.shape[1])].to(dtype)
    return (logits_TV / temperature).clamp(min=_MASKED)


def _log_softmax(logits_TV: torch.Tensor, vocab: VocabAxis) -> torch.Tensor:
    centred_TV = logits_TV - _highest(logits_TV, vocab)[:, None]
    log_sum_T = vocab.sum_shards(centred_TV.exp().sum(1)).log()
    return centred_TV - vocab.to_shards(log_sum_T)[:, None]


def _highest(logits_TV: torch.Tensor, vocab: VocabAxis) -> torch.Tensor:
    local_max_T = logits_TV.detach().amax(1) if logits_TV.shape[1] else logits_TV.new_full((len(logits_TV),), _MASKED)
    return vocab.max_shards(local_max_T)


def _entropy(logp_TV: torch.Tensor, vocab: VocabAxis) -> torch.Tensor:
    return -vocab.sum_shards((logp_TV.exp() * logp_TV).sum(1))


def _clipped(logp_TV: torch.Tensor, logq_TV: torch.Tensor, config: InterpolationLossConfig) -> torch.Tensor:
    """The terms of the forward KL that are above the clip."""
    if not config.clips_entries:
        return torch.zeros_like(logq_TV, dtype=torch.bool)
    return logq_TV.exp() * (logq_TV - logp_TV) > config.clip


def _token_logp(
    logits_TV: torch.Tensor,
    token_ids_T: torch.Tensor | None,
    temperature: float,
    *,
    vocab: VocabAxis,
    dtype: torch.dtype,
) -> torch.Tensor | None:
    checks.check_temperature("token_temperature", temperature)
    if token_ids_T is None:
        return None
    checks.check_token_ids(token_ids_T, logits_TV.shape[0], vocab=vocab, columns=logits_TV.shape[1])
    logp_TV = _log_softmax(_energies(logits_TV, temperature, vocab=vocab, dtype=dtype), vocab)
    columns = torch.arange(vocab.start, vocab.start + logp_TV.shape[1], device=logp_TV.device)
    return vocab.sum_shards(torch.where(columns == token_ids_T[:, None], logp_TV, 0.0).sum(1))


def _check_logits(
    student_TV: torch.Tensor,
    teacher_TV: torch.Tensor,
    full_teacher_TV: torch.Tensor | None,
    initial_TV: torch.Tensor | None,
    config: InterpolationLossConfig,
    vocab: VocabAxis,
) -> None:
    checks.check_matrix("student_logits_TV", student_TV, "tokens x columns", like=(None, None))
    checks.check_matrix("teacher_logits_TV", teacher_TV, "tokens x columns", like=tuple(student_TV.shape))
    checks.check_full_teacher("full_teacher_logits_TV", full_teacher_TV, config)
    checks.check_initial("initial_logits_TV", initial_TV, config)
    for name, value in (("full_teacher_logits_TV", full_teacher_TV), ("initial_logits_TV", initial_TV)):
        if value is not None:
            checks.check_matrix(name, value, "tokens x columns", like=tuple(student_TV.shape))
    vocab.valid_columns(student_TV.shape[1])
