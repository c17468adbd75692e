"""The loss once more, for tests: whole vocabulary, float64, plain autograd, nothing from the package but its settings.

Axes: T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import torch


def dense_loss(
    student_TV, teacher_TV, *, lengths, config, full_teacher_TV=None, initial_TV=None, keys=None, weight_T=None
):
    """Everything that LossOutput holds, from whole logits [T, V]; only student_TV may have a gradient."""
    student_TV = student_TV / config.temperature
    teacher_TV = teacher_TV.detach() / config.temperature
    frozen_TV = student_TV.detach()
    others = {"student": frozen_TV}
    for name, logits_TV in (("full_teacher", full_teacher_TV), ("initial", initial_TV)):
        others[name] = None if logits_TV is None else logits_TV.detach() / config.temperature
    partner_TV = others[config.partner]
    student_entropy_T, teacher_entropy_T = dense_entropy(frozen_TV), dense_entropy(teacher_TV)
    selected = dense_selection(student_entropy_T.numpy(), teacher_entropy_T.numpy(), lengths, config, keys)
    selected_T = torch.from_numpy(selected)
    mixed_TV = (1 - config.weight) * teacher_TV + config.weight * partner_TV
    target_TV = torch.where(selected_T[:, None], mixed_TV, teacher_TV) if config.control == "none" else teacher_TV
    q_TV, p_TV = torch.softmax(target_TV, 1), torch.softmax(student_TV, 1)
    log_q_TV, log_p_TV = torch.log_softmax(target_TV, 1), torch.log_softmax(student_TV, 1)
    outside_mass_T, support_size_T = torch.zeros(len(selected)).double(), torch.zeros(len(selected)).long()
    if config.support != "none":
        p0_TV = torch.softmax(others[config.support], 1)
        inside_TV = p0_TV >= config.support_ratio * p0_TV.amax(1, keepdim=True)
        outside_mass_T, support_size_T = (q_TV * ~inside_TV).sum(1), inside_TV.sum(1)
        q_TV = q_TV * inside_TV / (q_TV * inside_TV).sum(1, keepdim=True)
        log_q_TV = torch.where(inside_TV, q_TV, 1.0).log()  # times 0 outside
    if config.divergence == "forward_kl":
        terms_TV = q_TV * (log_q_TV - log_p_TV)
    elif config.divergence == "reverse_kl":
        terms_TV = p_TV * (log_p_TV - log_q_TV)
    else:
        assert config.divergence == "jsd"
        beta = config.jsd_beta
        log_m_TV = torch.log(beta * q_TV + (1 - beta) * p_TV)
        terms_TV = beta * q_TV * (log_q_TV - log_m_TV) + (1 - beta) * p_TV * (log_p_TV - log_m_TV)
    divergence_T = terms_TV.detach().sum(1)
    by_token = config.clip is not None and config.clip_rule == "token"
    clip = config.clip if config.clips_entries else math.inf
    clipped_TV = terms_TV.detach() > clip
    loss_T = terms_TV.clamp(max=clip).sum(1)
    clipped_share_T, clipped_entries_T = (q_TV * clipped_TV).sum(1), clipped_TV.sum(1)
    if by_token:
        above = [index for index, value in enumerate(divergence_T.tolist()) if value > config.clip]
        loss_T[above] = config.clip + config.clip * torch.log(loss_T[above] / config.clip)
        clipped_share_T[above] = 1.0 - config.clip / divergence_T[above]
        clipped_entries_T[above] = 1
    factor_T = torch.ones(len(selected), dtype=student_TV.dtype)
    if config.control == "reweight":
        factor_T[selected_T] = 1 - config.weight
    if config.elsewhere == "skip":
        factor_T[~selected_T] = 0.0
    factor_T = factor_T if weight_T is None else factor_T * weight_T
    if config.token_weight != "uniform":
        factor_T = factor_T * torch.from_numpy(dense_token_weights(divergence_T.numpy(), lengths, config))
    return SimpleNamespace(
        loss_T=loss_T * factor_T,
        student_entropy_T=student_entropy_T,
        teacher_entropy_T=teacher_entropy_T,
        selected_T=selected_T,
        divergence_T=divergence_T,
        clipped_share_T=clipped_share_T,
        clipped_entries_T=clipped_entries_T,
        carries_loss_T=selected_T if config.elsewhere == "skip" else torch.ones_like(selected_T),
        outside_mass_T=outside_mass_T,
        support_size_T=support_size_T,
    )


def dense_token_weights(divergence, lengths, config):
    """The weight of each token as a numpy array, one rollout and one token at a time."""
    weights, start = [], 0
    smallest = config.token_weight_minimum

    def squash(value):
        return smallest + (1.0 - smallest) / (1.0 + math.exp(-value))

    for length in lengths:
        values = [float(value) for value in divergence[start : start + length]]
        start += length
        if config.token_weight == "position":
            places = [(index + 0.5) / length for index in range(length)]
            weights += [squash((place - config.position_center) / config.position_width) for place in places]
            continue
        assert config.token_weight == "divergence"
        mean = sum(values) / max(length, 1)
        if mean == 0.0:
            weights += [1.0] * length
            continue
        credits = {}
        for index in reversed(range(length)):
            gate = 1.0 / (1.0 + math.exp(-(values[index] - mean) / (config.divergence_width * mean)))
            following = credits.get(index + 1, values[index])
            credits[index] = gate * values[index] + (1.0 - gate) * following
        weights += [squash((credits[index] - mean) / (config.divergence_width * mean)) for index in range(length)]
    return np.array(weights)


def dense_entropy(logits_TV):
    """Entropy in nats [T]."""
    return -(torch.softmax(logits_TV, 1) * torch.log_softmax(logits_TV, 1)).sum(1)


def dense_token_logp(logits_TV, ids_T, temperature):
    """Log-probability of each id [T]."""
    return torch.log_softmax(logits_TV / temperature, 1)[torch.arange(len(ids_T)), ids_T]


def dense_selection(student_entropy, teacher_entropy, lengths, config, keys=None):
    """The sparse set as a numpy bool array, one rollout and one position at a time."""
    selected, start = np.zeros(sum(lengths), dtype=bool), 0
    signs = {"teacher_minus_student": 1.0, "student_minus_teacher": -1.0}
    for index, length in enumerate(lengths):
        rows = range(start, start + length)
        mismatch = [signs.get(config.mismatch, 1.0) * (teacher_entropy[row] - student_entropy[row]) for row in rows]
        if config.mismatch == "absolute":
            mismatch = [abs(value) for value in mismatch]
        count = math.ceil(config.fraction * length - 1e-9)
        if config.positions == "all":
            chosen = list(range(length))
        elif config.positions == "none":
            chosen = []
        elif config.positions == "threshold":
            chosen = [position for position in range(length) if mismatch[position] > config.threshold_nats]
        elif config.positions == "random":
            words = np.random.Philox(key=keys[index]).random_raw(length)
            chosen = sorted(range(length), key=lambda position: words[position])[:count]
        else:
            chosen = sorted(range(length), key=lambda position: (-mismatch[position], position))[:count]
        selected[[start + position for position in chosen]] = True
        start += length
    return selected
