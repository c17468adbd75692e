"""The fused loss over drawn shapes and settings, and what it must not depend on.

Axes: T tokens, V vocabulary, H hidden.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_paint.losses import InterpolationLossConfig, WholeVocab, fused_interpolation_loss
from megatron_paint.losses.elementwise.divergences import DIVERGENCES
from megatron_paint.losses.output_layer.chunks import chunk_size, plan_chunks
from tests.losses.losses_cases import CASES, Case, make_data
from tests.losses.losses_compare import dense_case, relative
from tests.losses.losses_dense import dense_loss

POSITIONS = ("top_fraction", "threshold", "all", "none", "random")


@st.composite
def configs(draw) -> InterpolationLossConfig:
    """Any settings that are allowed."""
    divergence = draw(st.sampled_from(sorted(DIVERGENCES)))
    positions = draw(st.sampled_from(POSITIONS))
    control = draw(st.sampled_from(["none", "reweight"]))
    clip_rule = draw(st.sampled_from(["entry", "token"]))
    has_clip = divergence == "forward_kl" or clip_rule == "token"
    weight = draw(st.sampled_from([0.0, 0.1, 0.6, 1.0]))
    fraction = draw(st.sampled_from([0.0, 0.1, 0.4, 0.8, 1.0]))
    mixes = weight > 0 and (positions in ("threshold", "all") or (positions != "none" and fraction > 0))
    partners = ["student"]
    if control == "none":
        partners += ["full_teacher", "initial"] if mixes else ["full_teacher"]
    supports = ["none"] if divergence == "reverse_kl" else ["none", "initial", "student"]
    return InterpolationLossConfig(
        divergence=divergence,
        jsd_beta=draw(st.sampled_from([0.01, 0.5, 0.9])),
        temperature=draw(st.sampled_from([0.5, 1.1, 2.0])),
        clip=draw(st.sampled_from([None, 0.01, 0.3])) if has_clip else None,
        clip_rule=clip_rule,
        weight=weight,
        partner=draw(st.sampled_from(partners)),
        support=draw(st.sampled_from(supports)),
        support_ratio=draw(st.sampled_from([1e-30, 0.05, 0.3, 1.0])),
        positions=positions,
        fraction=fraction,
        threshold_nats=0.1 if positions == "threshold" else None,
        mismatch=draw(st.sampled_from(["absolute", "teacher_minus_student", "student_minus_teacher"])),
        elsewhere=draw(st.sampled_from(["teacher", "skip"])),
        control=control,
        token_weight=draw(st.sampled_from(["uniform", "position", "divergence"])),
        token_weight_minimum=draw(st.sampled_from([0.0, 0.25, 1.0])),
    )


@settings(max_examples=150, deadline=None)
@given(data=st.data(), config=configs())
def test_drawn_shapes_and_settings_equal_dense(data, config):
    lengths = data.draw(st.lists(st.integers(0, 7), max_size=4))
    columns, hidden = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 6))
    valid = data.draw(st.none() | st.integers(1, columns))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    student_TH, weight_VH = normal(sum(lengths), hidden).requires_grad_(), normal(columns, hidden).requires_grad_()
    teacher_TH, full_TH, initial_TH = student_TH.detach() + normal(3, sum(lengths), hidden)
    weight_T, keys = normal(sum(lengths)), [7 + index for index in range(len(lengths))]
    has_full = config.partner == "full_teacher"
    kept = slice(0, valid)
    want = dense_loss(
        (student_TH @ weight_VH.T)[:, kept],
        (teacher_TH @ weight_VH.T)[:, kept],
        lengths=lengths,
        config=config,
        full_teacher_TV=(full_TH @ weight_VH.T)[:, kept] if has_full else None,
        initial_TV=(initial_TH @ weight_VH.T)[:, kept] if config.needs_initial else None,
        keys=keys,
        weight_T=weight_T,
    )
    got = fused_interpolation_loss(
        student_TH,
        weight_VH,
        teacher_TH,
        lengths=lengths,
        config=config,
        vocab=WholeVocab(valid_size=valid),
        chunk_tokens=data.draw(st.integers(1, 12)),
        token_weight_T=weight_T,
        full_teacher_hidden_TH=full_TH if has_full else None,
        initial_hidden_TH=initial_TH if config.needs_initial else None,
        rollout_keys=keys,
    )
    if got.selected_T.tolist() != want.selected_T.tolist():
        # Two ways to sum may order a tie of rounding errors differently: with one column all entropies are 0.
        gap_T = (want.teacher_entropy_T - want.student_entropy_T).abs()
        assert valid == 1 or columns == 1 or gap_T.max() < 1e-12
        return
    leaves = (student_TH, weight_VH)
    for grad, want_grad in zip(
        torch.autograd.grad(got.loss_T.sum(), leaves), torch.autograd.grad(want.loss_T.sum(), leaves), strict=True
    ):
        assert (grad - want_grad).norm() <= 1e-11 * (1.0 + want_grad.norm())
    assert (got.loss_T - want.loss_T).norm() <= 1e-12 * (1.0 + want.loss_T.norm())


def _run(case: Case, data: SimpleNamespace, rows: slice = slice(None), lengths=None, chunk_tokens=None, keys=None):
    """Loss, selection and gradients of some rows of a case's data."""
    student_TH = data.student_TH[rows].clone().requires_grad_()
    weight_VH = data.weight_VH.clone().requires_grad_()
    output = fused_interpolation_loss(
        student_TH,
        weight_VH,
        data.teacher_TH[rows],
        lengths=data.lengths if lengths is None else lengths,
        config=case.config,
        vocab=WholeVocab(),
        chunk_tokens=chunk_tokens,
        full_teacher_hidden_TH=None if data.full_TH is None else data.full_TH[rows],
        initial_hidden_TH=None if data.initial_TH is None else data.initial_TH[rows],
        rollout_keys=data.keys if keys is None else keys,
    )
    output.loss_T.sum().backward()
    return SimpleNamespace(output=output, dhidden_TH=student_TH.grad, dweight_VH=weight_VH.grad)


INVARIANT = pytest.mark.parametrize(
    "name",
    [
        "clipped-cut",
        "reverse-cut-most",
        "jsd-cut-skip",
        "forward-cut-full-teacher",
        "forward-random",
        "forward-support-cut-partner-initial",
        "jsd-support-cut-student",
        "forward-weight-divergence-cut",
        "reverse-weight-position-cut",
    ],
)


@INVARIANT
def test_chunk_size_changes_nothing(name):
    case = CASES[name]
    data = make_data(case, torch.float64)
    whole = _run(case, data)
    for chunk_tokens in (1, 2, 3, 5, 8, 13, 100):
        run = _run(case, data, chunk_tokens=chunk_tokens)
        assert run.output.selected_T.equal(whole.output.selected_T)
        assert relative(run.output.loss_T, whole.output.loss_T) <= 1e-13
        assert relative(run.dhidden_TH, whole.dhidden_TH) <= 1e-13
        assert relative(run.dweight_VH, whole.dweight_VH) <= 1e-13


@INVARIANT
def test_splitting_rollouts_over_calls_changes_nothing(name):
    case = CASES[name]
    data = make_data(case, torch.float64)
    whole, start, dweight_VH = _run(case, data), 0, 0.0
    for length, key in zip(data.lengths, data.keys, strict=True):
        rows = slice(start, start + length)
        run = _run(case, data, rows, lengths=[length], chunk_tokens=4, keys=[key])
        assert run.output.selected_T.equal(whole.output.selected_T[rows])
        assert relative(run.output.loss_T, whole.output.loss_T[rows]) <= 1e-13
        assert relative(run.dhidden_TH, whole.dhidden_TH[rows]) <= 1e-13
        dweight_VH, start = dweight_VH + run.dweight_VH, start + length
    assert relative(dweight_VH, whole.dweight_VH) <= 1e-13


@INVARIANT
def test_order_of_rollouts_changes_nothing(name):
    case = CASES[name]
    data = make_data(case, torch.float64)
    whole = _run(case, data)
    order = [2, 0, 3, 1]
    rows_of = torch.arange(sum(data.lengths)).split(list(data.lengths))
    rows = torch.cat([rows_of[index] for index in order])
    lengths, keys = [data.lengths[index] for index in order], [data.keys[index] for index in order]
    run = _run(case, data, rows, lengths=lengths, chunk_tokens=6, keys=keys)
    assert run.output.selected_T.equal(whole.output.selected_T[rows])
    assert relative(run.output.loss_T, whole.output.loss_T[rows]) <= 1e-13
    assert relative(run.dhidden_TH, whole.dhidden_TH[rows]) <= 1e-13
    assert relative(run.dweight_VH, whole.dweight_VH) <= 1e-13


def test_backward_scales_by_a_common_factor():
    case = CASES["clipped"]
    data, want = make_data(case, torch.float64), dense_case(case, torch.float64)
    student_TH = data.student_TH.requires_grad_()
    output = fused_interpolation_loss(
        student_TH, data.weight_VH, data.teacher_TH, lengths=data.lengths, config=case.config, vocab=WholeVocab()
    )
    (output.loss_T.sum() * -0.25).backward()
    # The dense gradient was taken with a factor of 0.125.
    assert relative(student_TH.grad, want.dhidden_TH * -2.0) <= 1e-13


def test_a_cpu_fills_chunks_with_256_rows():
    sizes = {"columns": 151_936, "buffers": 2, "dtype": torch.float32}
    cpu = chunk_size(None, 1e9, device=torch.device("cpu"), **sizes)
    # (1e9 - 6 x 4 x 2^17 bytes of tiles) / (2 x 151,936 x 4)
    assert (cpu.tokens, cpu.together) == (820, 256)
    small = chunk_size(None, 1e8, device=torch.device("cpu"), **sizes)
    assert small.tokens == small.together == 79
    gpu = chunk_size(None, 1e9, device=torch.device("cuda"), **sizes)
    assert gpu.tokens == gpu.together == 657
    asked = chunk_size(700, 1e9, device=torch.device("cpu"), **sizes)
    assert asked.tokens == asked.together == 700


@pytest.mark.parametrize("fraction", [0.1, 0.0])
def test_chunks_of_256_rows_equal_one_chunk(fraction):
    """Rollouts of 300, 200, 1, 150 and 90 tokens: one alone, two together, two together."""
    generator = torch.Generator().manual_seed(5)
    rows, config = 741, InterpolationLossConfig(fraction=fraction)
    made = [torch.randn(size, 8, generator=generator, dtype=torch.float64) for size in (rows, rows, 40)]

    def run(**chunks):
        student_TH, teacher_TH, weight_VH = (values.clone().requires_grad_() for values in made)
        lengths = (300, 200, 1, 150, 90)
        output = fused_interpolation_loss(
            student_TH, weight_VH, teacher_TH, lengths=lengths, config=config, vocab=WholeVocab(), **chunks
        )
        output.loss_T.sum().backward()
        return output, student_TH.grad, weight_VH.grad

    (one, *gradients), (many, *others) = run(chunk_tokens=1000), run()
    assert torch.equal(one.selected_T, many.selected_T)
    assert int(one.selected_T.sum()) == (75 if fraction else 0)  # each rollout rounds up
    assert relative(many.loss_T.detach(), one.loss_T.detach()) <= 1e-13
    assert all(relative(found, want) <= 1e-12 for found, want in zip(others, gradients, strict=True))


@given(
    lengths=st.lists(st.integers(0, 30), max_size=8),
    chunk_tokens=st.integers(1, 12),
    whole=st.booleans(),
    together=st.none() | st.integers(1, 12),
)
def test_chunks_cover_every_row_once(lengths, chunk_tokens, whole, together):
    together = together and min(together, chunk_tokens)
    chunks = plan_chunks(lengths, chunk_tokens, whole_rollouts=whole, together=together)
    if together:  # only a rollout that is not cut, or a piece of a longer one, may have more rows
        alone = [chunk for chunk in chunks if chunk.lengths is None or len(chunk.lengths) == 1]
        assert all(chunk.stop - chunk.start <= together for chunk in chunks if not (whole and chunk in alone))
    rows = [row for chunk in chunks for row in range(chunk.start, chunk.stop)]
    assert rows == list(range(sum(lengths)))
    assert all(0 < chunk.stop - chunk.start <= chunk_tokens for chunk in chunks)
    if whole:
        assert [n for chunk in chunks for n in chunk.lengths or () if n] == [
            n for n in lengths if 0 < n <= chunk_tokens
        ]
