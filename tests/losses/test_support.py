"""The support of a target: its limits, ties, the leak that it measures, and values worked out by hand.

Axes: T tokens, V vocabulary, H hidden.
"""

from __future__ import annotations

import math

import pytest
import torch

from megatron_paint.losses import InterpolationLossConfig, WholeVocab, fused_interpolation_loss, interpolation_loss
from tests.losses.losses_cases import CASES, make_data

OUTPUTS = ("loss_T", "divergence_T", "student_entropy_T", "teacher_entropy_T", "clipped_share_T", "selected_T")


def _fused(data, *, chunk_tokens=None, dtype=None, **settings):
    """Output and gradients of the fused loss on a case's data."""
    config = InterpolationLossConfig(**settings)
    student_TH, weight_VH = data.student_TH.clone().requires_grad_(), data.weight_VH.clone().requires_grad_()
    output = fused_interpolation_loss(
        student_TH,
        weight_VH,
        data.teacher_TH,
        lengths=data.lengths,
        config=config,
        vocab=WholeVocab(),
        chunk_tokens=chunk_tokens,
        initial_hidden_TH=data.initial_TH if config.needs_initial else None,
        rollout_keys=data.keys,
        kernel="torch",
    )
    output.loss_T.sum().backward()
    return output, student_TH.grad, weight_VH.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("chunk_tokens", [None, 6])
@pytest.mark.parametrize("support", ["initial", "student"])
@pytest.mark.parametrize(
    "settings",
    [
        {"positions": "none"},  # OPSD
        {"weight": 0.6, "fraction": 0.7},
        {"divergence": "jsd"},
        {"clip": 0.02},
        {"clip": 0.05, "clip_rule": "token", "elsewhere": "skip"},
    ],
)
def test_a_support_of_everything_changes_nothing_to_the_bit(settings, support, chunk_tokens, dtype):
    data = make_data(CASES["forward-support"], dtype)
    plain = _fused(data, chunk_tokens=chunk_tokens, **settings)
    whole = _fused(data, chunk_tokens=chunk_tokens, support=support, support_ratio=1e-30, **settings)
    assert whole[0].support_size_T.eq(48).all()
    assert whole[0].outside_mass_T.eq(0.0).all()
    assert all(getattr(whole[0], name).equal(getattr(plain[0], name)) for name in OUTPUTS)
    assert whole[1].equal(plain[1])
    assert whole[2].equal(plain[2])


def _from_logits(student, teacher, initial, **settings):
    """One token's loss by the reference and by the fused loss (logits as hidden states of an identity layer)."""
    student_TV, teacher_TV, initial_TV = (
        torch.tensor([row], dtype=torch.float64) for row in (student, teacher, initial)
    )
    config = InterpolationLossConfig(temperature=1.0, positions="none", support="initial", **settings)
    student_TV.requires_grad_()
    reference = interpolation_loss(student_TV, teacher_TV, initial_logits_TV=initial_TV, lengths=[1], config=config)
    reference.loss_T.sum().backward()
    hidden_TH = student_TV.detach().clone().requires_grad_()
    fused = fused_interpolation_loss(
        hidden_TH,
        torch.eye(len(student), dtype=torch.float64),
        teacher_TV,
        initial_hidden_TH=initial_TV,
        lengths=[1],
        config=config,
        vocab=WholeVocab(),
        kernel="torch",
    )
    fused.loss_T.sum().backward()
    return (reference, student_TV.grad[0]), (fused, hidden_TH.grad[0])


def test_values_worked_out_by_hand():
    """p_0 = (1/2, 1/4, 1/8, 1/8), ratio 1/2: S is the first two. The teacher has 3/4 of its mass outside."""
    initial, teacher = [math.log(share) for share in (4, 2, 1, 1)], [math.log(share) for share in (1, 3, 6, 6)]
    for output, gradient in _from_logits([0.0] * 4, teacher, initial, support_ratio=0.5):
        assert output.support_size_T.tolist() == [2]
        assert output.outside_mass_T.tolist() == pytest.approx([0.75])
        # q = (1/4, 3/4, 0, 0) and p = 1/4 everywhere.
        assert output.loss_T.tolist() == pytest.approx([0.75 * math.log(3)])
        assert gradient.tolist() == pytest.approx([0.0, -0.5, 0.25, 0.25])


def test_a_ratio_of_one_keeps_the_most_plausible_token():
    for output, gradient in _from_logits([0.0, 0.0, 0.0], [0.0, 5.0, 1.0], [3.0, 1.0, 2.0], support_ratio=1.0):
        assert output.support_size_T.tolist() == [1]
        assert output.loss_T.tolist() == pytest.approx([math.log(3)])
        assert gradient.tolist() == pytest.approx([-2 / 3, 1 / 3, 1 / 3])


def test_a_ratio_of_one_keeps_all_ties():
    for output, gradient in _from_logits([0.0, 0.0, 0.0], [0.0, 5.0, math.log(3)], [3.0, 1.0, 3.0], support_ratio=1.0):
        assert output.support_size_T.tolist() == [2]
        # q = (1/4, 0, 3/4)
        assert gradient.tolist() == pytest.approx([1 / 3 - 1 / 4, 1 / 3, 1 / 3 - 3 / 4])


def test_the_temperature_of_the_loss_widens_the_support():
    """p_0(v) / max p_0 = (1, 0.1): at temperature 2 the ratio of the second one is 0.32."""
    initial = [0.0, math.log(0.1)]
    for temperature, size in ((1.0, 1), (2.0, 2)):
        config = InterpolationLossConfig(temperature=temperature, support="initial", support_ratio=0.2)
        logits_TV = torch.zeros(1, 2, dtype=torch.float64)
        initial_TV = torch.tensor([initial], dtype=torch.float64)
        output = interpolation_loss(logits_TV, logits_TV, initial_logits_TV=initial_TV, lengths=[1], config=config)
        assert output.support_size_T.tolist() == [size]


def test_a_teacher_outside_the_support_still_teaches_within_it():
    """The teacher puts all its mass but e^-200 outside S. The rest is renormalised. Nothing overflows."""
    for dtype in (torch.float32, torch.float64):
        hidden_TH = torch.zeros(1, 3, dtype=dtype, requires_grad=True)
        output = fused_interpolation_loss(
            hidden_TH,
            torch.eye(3, dtype=dtype),
            torch.tensor([[-200.0, 0.0, -201.0]], dtype=dtype),
            initial_hidden_TH=torch.tensor([[0.0, -50.0, 0.0]], dtype=dtype),
            lengths=[1],
            config=InterpolationLossConfig(temperature=1.0, positions="none", support="initial"),
            vocab=WholeVocab(),
            kernel="torch",
        )
        output.loss_T.sum().backward()
        q = 1 / (1 + math.exp(-1.0))
        assert output.outside_mass_T.item() == pytest.approx(1.0)
        assert hidden_TH.grad[0].tolist() == pytest.approx([1 / 3 - q, 1 / 3, 1 / 3 - (1 - q)], abs=1e-6)
