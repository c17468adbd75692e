"""The interpolation loss on hard numbers: formulas by hand, limits, masks, extreme logits, small divergences, types.

Axes: T tokens, V vocabulary, H hidden.
"""

from __future__ import annotations

import math

import pytest
import torch

from megatron_paint.losses import (
    InterpolationLossConfig,
    WholeVocab,
    fused_interpolation_loss,
    interpolation_loss,
    token_logprobs,
)
from megatron_paint.losses.elementwise.divergences import DIVERGENCES
from tests.losses.losses_cases import Case, make_data, options
from tests.losses.losses_compare import relative
from tests.losses.losses_dense import dense_loss

OPTIONS = options(clip=0.02)
DETACHED = ("student_entropy_T", "teacher_entropy_T", "divergence_T", "clipped_share_T", "token_logp_T")


def _reference(student_TV, teacher_TV, **kwargs):
    return interpolation_loss(student_TV, teacher_TV, **kwargs)


def _fused(student_TV, teacher_TV, **kwargs):
    """The fused loss on given logits: one-hot hidden states, and the logits as output weights."""
    hidden_TT = torch.eye(student_TV.shape[0], dtype=student_TV.dtype)
    return fused_interpolation_loss(
        hidden_TT, student_TV.T, hidden_TT, teacher_output_weight_VH=teacher_TV.T, vocab=WholeVocab(), **kwargs
    )


BOTH = pytest.mark.parametrize("loss", [_reference, _fused])
ALL_OPTIONS = pytest.mark.parametrize("given", OPTIONS.values(), ids=OPTIONS)


def _logits(tokens: int, columns: int = 12, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student_TV, noise_TV = torch.randn(2, tokens, columns, generator=generator, dtype=torch.float64) * 2.0
    return student_TV, student_TV + 0.5 * noise_TV


@BOTH
def test_two_entries_by_hand(loss):
    """q = (3/4, 1/4), p = (1/2, 1/2): KL = 3/4 log(3/2) + 1/4 log(1/2); a clip of 0.1 leaves 0.1 + 1/4 log(1/2)."""
    student_TV = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    teacher_TV = torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64)
    plain = {"positions": "none", "temperature": 1.0}
    output = loss(student_TV, teacher_TV, lengths=[1], config=InterpolationLossConfig(**plain))
    exact = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert output.loss_T.item() == pytest.approx(exact, rel=1e-14)
    assert output.student_entropy_T.item() == pytest.approx(math.log(2.0), rel=1e-14)
    output = loss(student_TV, teacher_TV, lengths=[1], config=InterpolationLossConfig(**plain, clip=0.1))
    assert output.loss_T.item() == pytest.approx(0.1 + 0.25 * math.log(0.5), rel=1e-14)
    assert output.divergence_T.item() == pytest.approx(exact, rel=1e-14)
    assert output.clipped_share_T.item() == pytest.approx(0.75, rel=1e-14)
    assert output.clipped_entries_T.tolist() == [1]
    output.loss_T.sum().backward()
    # p Q_A - q [A]: Q_A = 1/4, and only the second entry is in A.
    torch.testing.assert_close(
        student_TV.grad, torch.tensor([[0.125, -0.125]], dtype=torch.float64), rtol=1e-14, atol=0
    )


@BOTH
@ALL_OPTIONS
def test_gradient_equals_finite_differences(loss, given):
    """With the target held: a teacher that needs no partner, so that the loss is a function of the student alone."""
    config = InterpolationLossConfig(**given, weight=0.0)
    student_TV, teacher_TV = _logits(3)
    student_TV.requires_grad_()
    loss(student_TV, teacher_TV, lengths=[3], config=config).loss_T.sum().backward()
    step = 1e-6
    for row, column in ((0, 0), (1, 5), (2, 11)):
        values = []
        for sign in (1.0, -1.0):
            moved_TV = student_TV.detach().clone()
            moved_TV[row, column] += sign * step
            values.append(loss(moved_TV, teacher_TV, lengths=[3], config=config).loss_T.sum().item())
        slope = (values[0] - values[1]) / (2 * step)
        assert student_TV.grad[row, column].item() == pytest.approx(slope, rel=1e-6, abs=1e-9)


@BOTH
def test_clip_gradient_is_the_formula(loss):
    """dl/dz_i = (p_i Q_A - q_i [i in A]) / T."""
    config = InterpolationLossConfig(clip=0.02, positions="none")
    student_TV, teacher_TV = _logits(20)
    student_TV.requires_grad_()
    output = loss(student_TV, teacher_TV, lengths=[20], config=config)
    output.loss_T.sum().backward()
    p_TV = torch.softmax(student_TV.detach() / 1.1, 1)
    q_TV = torch.softmax(teacher_TV / 1.1, 1)
    kept_TV = q_TV * torch.log(q_TV / p_TV) <= 0.02
    kept_mass_T = (q_TV * kept_TV).sum(1)
    assert relative(student_TV.grad, (p_TV * kept_mass_T[:, None] - q_TV * kept_TV) / 1.1) <= 1e-13
    assert relative(output.clipped_share_T, 1.0 - kept_mass_T) <= 1e-13


@BOTH
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_clip_of_tokens_shortens_the_gradient_and_keeps_its_direction(loss, divergence):
    """clip / divergence times the gradient without clip above the clip, the same below it; the value meets there."""
    student_TV, teacher_TV = _logits(20)
    gradients, outputs = [], []
    clip = 0.04 if divergence == "jsd" else 0.2
    for given in (None, clip):
        logits_TV = student_TV.clone().requires_grad_()
        config = InterpolationLossConfig(clip=given, clip_rule="token", divergence=divergence, positions="none")
        outputs.append(loss(logits_TV, teacher_TV, lengths=[20], config=config))
        outputs[-1].loss_T.sum().backward()
        gradients.append(logits_TV.grad)
    plain, clipped = outputs
    shorter_T = (clip / plain.divergence_T).clamp(max=1.0)
    assert 3 < (shorter_T < 1).sum() < 17
    assert relative(gradients[1], gradients[0] * shorter_T[:, None]) <= 1e-12
    expected_T = torch.where(shorter_T < 1, clip * (1 - shorter_T.log()), plain.loss_T)
    assert relative(clipped.loss_T, expected_T) <= 1e-12
    assert relative(clipped.clipped_share_T, 1 - shorter_T) <= 1e-12
    assert clipped.clipped_entries_T.tolist() == (shorter_T < 1).long().tolist()


@pytest.mark.parametrize("rule", ["entry", "token"])
def test_only_a_clip_of_entries_pushes_the_right_token_down(rule):
    """q = (.95, .04, .01), p = (.60, .35, .05): the target's top token must rise, and the clip of entries lowers it."""
    student_TV = torch.tensor([[0.60, 0.35, 0.05]], dtype=torch.float64).log().requires_grad_()
    teacher_TV = torch.tensor([[0.95, 0.04, 0.01]], dtype=torch.float64).log()
    config = InterpolationLossConfig(clip=0.05, clip_rule=rule, temperature=1.0, positions="none")
    interpolation_loss(student_TV, teacher_TV, lengths=[1], config=config).loss_T.sum().backward()
    falls = student_TV.grad[0, 0].item() > 0
    assert falls == (rule == "entry")


@BOTH
@ALL_OPTIONS
def test_identical_teacher_gives_nothing(loss, given):
    student_TV, _ = _logits(9)
    for dtype in (torch.float64, torch.float32):
        logits_TV = student_TV.to(dtype, copy=True).requires_grad_()
        output = loss(logits_TV, logits_TV.detach(), lengths=[9], config=InterpolationLossConfig(**given))
        output.loss_T.sum().backward()
        assert output.loss_T.abs().max() <= 1e-12
        assert logits_TV.grad.abs().max() <= (1e-15 if dtype == torch.float64 else 1e-7)
        assert output.selected_T.tolist() == [True] + [False] * 8


@BOTH
@ALL_OPTIONS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_extreme_logits_stay_finite(loss, given, dtype):
    """Logits up to 1e4 either way: probabilities of 0, log-ratios of 2e4; dense values where those are finite."""
    generator = torch.Generator().manual_seed(1)
    student_TV = (torch.rand(8, 12, generator=generator, dtype=torch.float64) - 0.5) * 2e4
    teacher_TV = (torch.rand(8, 12, generator=generator, dtype=torch.float64) - 0.5) * 2e4
    student_TV, teacher_TV = student_TV.to(dtype, copy=True).requires_grad_(), teacher_TV.to(dtype)
    config = InterpolationLossConfig(**given, positions="all")
    output = loss(student_TV, teacher_TV, lengths=[5, 3], config=config)
    output.loss_T.sum().backward()
    assert all(torch.isfinite(getattr(output, name)).all() for name in ("loss_T", *DETACHED[:4]))
    assert torch.isfinite(student_TV.grad).all()
    if given.get("divergence") != "jsd":
        want = dense_loss(student_TV.detach().double(), teacher_TV.double(), lengths=[5, 3], config=config)
        assert relative(output.loss_T, want.loss_T) <= (1e-12 if dtype == torch.float64 else 1e-5)


@ALL_OPTIONS
def test_masked_columns_contribute_nothing(given):
    """-inf on both sides: the same as without these columns, and no gradient to them."""
    config = InterpolationLossConfig(**given, weight=0.4, fraction=0.5)
    student_TV, teacher_TV = _logits(6)
    gap = torch.full((6, 3), -math.inf, dtype=torch.float64)
    short = student_TV.clone().requires_grad_()
    wide = torch.cat((student_TV[:, :4], gap, student_TV[:, 4:]), 1).requires_grad_()
    want = interpolation_loss(short, teacher_TV, lengths=[6], config=config)
    wide_teacher_TV = torch.cat((teacher_TV[:, :4], gap, teacher_TV[:, 4:]), 1)
    got = interpolation_loss(wide, wide_teacher_TV, lengths=[6], config=config)
    want.loss_T.sum().backward()
    got.loss_T.sum().backward()
    assert relative(got.loss_T, want.loss_T) <= 1e-13
    assert relative(wide.grad[:, [0, 1, 2, 3, *range(7, 15)]], short.grad) <= 1e-13
    assert wide.grad[:, 4:7].eq(0.0).all()


@BOTH
@ALL_OPTIONS
def test_small_divergence_keeps_its_digits_in_float32(loss, given):
    """A divergence of about 4e-5 nats over 20,000 entries: a plain sum of q log(q/p) is off by more than 1 %."""
    generator = torch.Generator().manual_seed(2)
    student_TV = torch.randn(4, 20_000, generator=generator) * 2.0 + 20.0
    # Steps of 2^-12 around 2^5 are exact in float32, so both precisions see the same logits.
    teacher_TV = student_TV + torch.round(torch.randn(4, 20_000, generator=generator) * 36.0) * 2.0**-12
    config = InterpolationLossConfig(**given | {"clip": None}, temperature=1.0, positions="none")
    output = loss(student_TV, teacher_TV, lengths=[4], config=config)
    want = dense_loss(student_TV.double(), teacher_TV.double(), lengths=[4], config=config)
    assert 5e-6 < want.divergence_T.mean() < 1e-4
    assert relative(output.divergence_T, want.divergence_T) <= 2e-5


@BOTH
@ALL_OPTIONS
def test_only_the_student_logits_get_a_gradient(loss, given):
    """Teacher, partner, selection and entropies are constants, though the student is the partner of its own target."""
    config = InterpolationLossConfig(**given, weight=0.5, fraction=0.5)
    student_TV, teacher_TV = _logits(8)
    student_TV.requires_grad_()
    teacher_TV.requires_grad_()
    output = loss(student_TV, teacher_TV, lengths=[8], config=config, token_ids_T=torch.arange(8))
    output.loss_T.sum().backward()
    assert teacher_TV.grad is None
    assert not any(getattr(output, name).requires_grad for name in (*DETACHED, "selected_T", "carries_loss_T"))
    held = dense_loss(student_TV, teacher_TV, lengths=[8], config=config)
    assert relative(student_TV.grad, torch.autograd.grad(held.loss_T.sum(), student_TV)[0]) <= 1e-12


@BOTH
def test_limits_are_opsd(loss):
    """weight 0, fraction 0 and no positions are the plain teacher; reweight by 1 leaves selected ones nothing."""
    student_TV, teacher_TV = _logits(10)
    student_TV.requires_grad_()
    losses = []
    for settings in ({"weight": 0.0}, {"fraction": 0.0}, {"positions": "none"}):
        config = InterpolationLossConfig(**settings, clip=0.05)
        losses.append(loss(student_TV, teacher_TV, lengths=[4, 6], config=config).loss_T)
    assert relative(losses[0], losses[1]) <= 1e-15
    assert relative(losses[0], losses[2]) <= 1e-15
    config = InterpolationLossConfig(control="reweight", weight=1.0, clip=0.05)
    output = loss(student_TV, teacher_TV, lengths=[4, 6], config=config)
    assert relative(output.loss_T, losses[0] * ~output.selected_T) <= 1e-15


def test_skip_without_a_selected_position_is_zero():
    config = InterpolationLossConfig(positions="none", elsewhere="skip")
    student_TV, teacher_TV = _logits(5)
    student_TV.requires_grad_()
    output = _fused(student_TV, teacher_TV, lengths=[5], config=config)
    output.loss_T.sum().backward()
    assert output.loss_T.eq(0.0).all()
    assert student_TV.grad.eq(0.0).all()
    assert not output.carries_loss_T.any()


@ALL_OPTIONS
def test_bfloat16_inputs_keep_float32_logits(given):
    """Values to float32 accuracy; the gradients are rounded once, to the inputs' type."""
    case = Case(name="bf16", settings=given | {"fraction": 0.3}, chunk_tokens=5)
    data = make_data(case, torch.bfloat16)
    student_TH = data.student_TH.requires_grad_()
    weight_VH = data.weight_VH.requires_grad_()
    full_TH = student_TH.detach().double().requires_grad_()
    full_VH = weight_VH.detach().double().requires_grad_()
    settings = {"lengths": data.lengths, "config": case.config}
    want = dense_loss(full_TH @ full_VH.T, data.teacher_TH.double() @ full_VH.T, **settings)
    got = fused_interpolation_loss(
        student_TH, weight_VH, data.teacher_TH, vocab=WholeVocab(), chunk_tokens=case.chunk_tokens, **settings
    )
    want.loss_T.sum().backward()
    got.loss_T.sum().backward()
    assert got.loss_T.dtype == torch.float32
    assert relative(got.loss_T, want.loss_T) <= 5e-6
    for grad, want_grad in ((student_TH.grad, full_TH.grad), (weight_VH.grad, full_VH.grad)):
        assert grad.dtype == torch.bfloat16
        assert relative(grad, want_grad.to(torch.bfloat16)) <= 1e-4


def test_narrow_tiles_change_nothing(monkeypatch):
    """Products whose operands must be cast go over vocabulary tiles; here of one column each."""
    case = Case(name="bf16")
    data = make_data(case, torch.bfloat16)

    def run() -> list[torch.Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in (data.student_TH, data.weight_VH)]
        settings = {"lengths": data.lengths, "config": case.config, "vocab": WholeVocab()}
        output = fused_interpolation_loss(*leaves, data.teacher_TH, **settings)
        output.loss_T.sum().backward()
        return [output.loss_T, *(leaf.grad for leaf in leaves)]

    whole = run()
    monkeypatch.setattr("megatron_paint.losses.output_layer.products.TILE_BYTES", 1)
    assert all(relative(one, many) <= 1e-3 for one, many in zip(run(), whole, strict=True))
    assert relative(run()[0], whole[0]) <= 1e-6


def test_no_gradient_work_where_none_is_wanted(monkeypatch):
    """Under no_grad nothing is formed; a frozen weight or frozen hidden states save their part."""
    case = Case(name="frozen", chunk_tokens=6)
    data = make_data(case, torch.float64)
    made = []
    monkeypatch.setattr(
        "megatron_paint.losses.output_layer.products.backproject",
        lambda d_TV, w_VH, _: made.append("hidden") or d_TV @ w_VH,
    )
    monkeypatch.setattr(
        "megatron_paint.losses.output_layer.products.WeightGradient.add", lambda *_: made.append("weight")
    )
    settings = {"lengths": data.lengths, "config": case.config, "vocab": WholeVocab(), "chunk_tokens": 6}

    def run(hidden: bool, weight: bool) -> set[str]:
        made.clear()
        student_TH = data.student_TH.clone().requires_grad_(hidden)
        weight_VH = data.weight_VH.clone().requires_grad_(weight)
        fused_interpolation_loss(student_TH, weight_VH, data.teacher_TH, **settings)
        token_logprobs(
            student_TH, weight_VH, data.ids_T, vocab=WholeVocab(), token_weight_T=torch.ones(len(data.ids_T))
        )
        return set(made)

    assert run(hidden=True, weight=True) == {"hidden", "weight"}
    assert run(hidden=True, weight=False) == {"hidden"}
    assert run(hidden=False, weight=True) == {"weight"}
    assert run(hidden=False, weight=False) == set()
    with torch.no_grad():
        assert run(hidden=True, weight=True) == set()


def test_no_grad_gives_the_same_values():
    case = Case(name="values", chunk_tokens=6)
    data = make_data(case, torch.float64)
    settings = {"lengths": data.lengths, "config": case.config, "vocab": WholeVocab(), "chunk_tokens": 6}
    student_TH = data.student_TH.requires_grad_()
    with_grad = fused_interpolation_loss(student_TH, data.weight_VH, data.teacher_TH, **settings)
    with torch.no_grad():
        without = fused_interpolation_loss(student_TH, data.weight_VH, data.teacher_TH, **settings)
    assert not without.loss_T.requires_grad
    assert relative(without.loss_T, with_grad.loss_T) <= 1e-15
