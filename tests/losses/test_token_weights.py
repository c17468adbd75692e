"""Weights of tokens: values worked out by hand, and what they leave as it is."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_paint.losses import InterpolationLossConfig, WholeVocab, fused_interpolation_loss
from megatron_paint.losses.token_weights import token_weights
from tests.losses.losses_cases import CASES, make_data

LIKE = torch.zeros(4, dtype=torch.float64)


def _sigmoid(value: float) -> float:
    return 1.0 / (1.0 + math.exp(-value))


def test_published_weights_by_position():
    """PW-OPSD's formula with its values, at the middle of each token's share of the response."""
    config = InterpolationLossConfig(token_weight="position")
    weights = token_weights(None, [4], config, like=LIKE).tolist()
    assert weights == pytest.approx([0.25 + 0.75 * _sigmoid((t - 0.30) / 0.10) for t in (0.125, 0.375, 0.625, 0.875)])
    assert weights == pytest.approx([0.3610, 0.7594, 0.9720, 0.9976], abs=1e-4)


def test_weights_by_position_start_anew_in_each_rollout():
    config = InterpolationLossConfig(token_weight="position")
    alone = [token_weights(None, [length], config, like=LIKE) for length in (3, 0, 1)]
    assert torch.cat(alone).equal(token_weights(None, [3, 0, 1], config, like=LIKE))


def test_weights_by_divergence():
    """Divergences 0, 0, 4, 0: mean 1, width 1/2. The tokens before the third get its credit; the last has none."""
    config = InterpolationLossConfig(token_weight="divergence")
    low, high = _sigmoid(-2.0), _sigmoid(6.0)
    third = high * 4.0 + (1.0 - high) * 0.0
    second = (1.0 - low) * third
    first = (1.0 - low) * second
    expected = [0.25 + 0.75 * _sigmoid((credit - 1.0) / 0.5) for credit in (first, second, third, 0.0)]
    divergence_T = torch.tensor([0.0, 0.0, 4.0, 0.0], dtype=torch.float64)
    weights = token_weights(divergence_T, [4], config, like=LIKE).tolist()
    assert weights == pytest.approx(expected)
    assert weights == pytest.approx([0.9888, 0.9951, 0.9981, 0.3394], abs=1e-4)


def test_scale_of_divergences_does_not_change_their_weights():
    config = InterpolationLossConfig(token_weight="divergence")
    divergence_T = torch.tensor([0.1, 0.7, 0.2, 0.4], dtype=torch.float64)
    one, other = (token_weights(divergence_T * scale, [4], config, like=LIKE) for scale in (1.0, 1e-6))
    assert one == pytest.approx(other)


def test_a_rollout_without_divergence_has_weights_of_one():
    config = InterpolationLossConfig(token_weight="divergence")
    divergence_T = torch.tensor([0.0, 0.0, 1.0, 3.0])
    weights = token_weights(divergence_T, [2, 2], config, like=LIKE).tolist()
    assert weights[:2] == [1.0, 1.0]
    assert weights[2] < weights[3] < 1.0


def test_a_smallest_weight_of_one_is_uniform_to_the_bit():
    data = make_data(CASES["forward-cut"], torch.float32)

    def run(**settings):
        student_TH, weight_VH = data.student_TH.clone().requires_grad_(), data.weight_VH.clone().requires_grad_()
        output = fused_interpolation_loss(
            student_TH,
            weight_VH,
            data.teacher_TH,
            lengths=data.lengths,
            config=InterpolationLossConfig(**settings),
            vocab=WholeVocab(),
            chunk_tokens=6,
        )
        output.loss_T.sum().backward()
        return output.loss_T, student_TH.grad, weight_VH.grad

    for kind in ("position", "divergence"):
        for got, want in zip(run(token_weight=kind, token_weight_minimum=1.0), run(), strict=True):
            assert got.equal(want)


def test_a_divergence_that_is_not_finite_stays_visible():
    config = InterpolationLossConfig(token_weight="divergence")
    for value in (math.nan, math.inf):
        weight_T = token_weights(torch.tensor([1.0, value, 1.0, 1.0]), [4], config, like=LIKE)
        assert not torch.isfinite(weight_T * torch.tensor([1.0, value, 1.0, 1.0])).all()
