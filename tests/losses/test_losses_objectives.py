"""What the losses of the objectives report of each token, by the name under which it is added up."""

from __future__ import annotations

import torch

from megatron_paint.losses import InterpolationLossConfig, WholeVocab, interpolation_loss
from megatron_paint.losses.interface import ResponseRows
from megatron_paint.losses.objectives import CrossEntropyLoss, DistillationLoss
from megatron_paint.records import Problem, Rollout, Sample
from tests.losses.losses_cases import Case, make_data
from tests.losses.losses_compare import relative


def rows(data) -> ResponseRows:
    samples = tuple(
        Sample(
            problem=Problem(id=str(key), problem="", solution="", answer=""),
            key=key,
            rollout=Rollout(problem_id=str(key), prompt_ids=(1,), response_ids=tuple(ids.tolist())),
        )
        for key, ids in zip(data.keys, data.ids_T.split(data.lengths), strict=True)
    )
    return ResponseRows(
        samples=samples,
        lengths=data.lengths,
        token_ids_N=data.ids_T,
        student_hidden_NH=data.student_TH,
        output_weight_VH=data.weight_VH,
        vocab=WholeVocab(),
        teacher_hidden_NH=data.teacher_TH,
    )


def test_distillation_counts_each_value_where_it_belongs():
    """Against the reference: divergences split by the selection, the clip's mass and entries where loss is carried."""
    config = InterpolationLossConfig(clip=0.02, elsewhere="skip", fraction=0.4)
    data = make_data(Case(name="sums"), torch.float64)
    got = DistillationLoss(config=config, chunk_bytes=1e6, token_temperature=1.1)(rows(data))
    want = interpolation_loss(
        data.student_TH @ data.weight_VH.T, data.teacher_TH @ data.weight_VH.T, lengths=data.lengths, config=config
    )
    selected_T = want.selected_T
    assert got.selected_T.equal(selected_T)
    assert got.carries_loss_T.equal(selected_T)
    assert (want.clipped_entries_T[~selected_T] > 0).any()
    expected = {
        "student_entropy": want.student_entropy_T,
        "teacher_entropy": want.teacher_entropy_T,
        "divergence_selected": want.divergence_T * selected_T,
        "divergence_other": want.divergence_T * ~selected_T,
        "clipped_mass": want.clipped_share_T * selected_T,
        "clipped_entries": want.clipped_entries_T * selected_T,
    }
    assert got.sums.keys() == expected.keys()
    assert all(relative(got.sums[name], expected[name]) <= 1e-12 for name in expected)
    assert not any(values_T.requires_grad for values_T in got.sums.values())
    # Of the samples whose tokens are kept: at every token, selected or not.
    tokens = {
        "divergence": "divergence_T",
        "student_entropy": "student_entropy_T",
        "teacher_entropy": "teacher_entropy_T",
    }
    assert got.kept.keys() == tokens.keys()
    assert all(relative(got.kept[name], getattr(want, field)) <= 1e-12 for name, field in tokens.items())


def test_cross_entropy_reports_its_loss_and_the_student_s_entropy():
    data = make_data(Case(name="sums"), torch.float64)
    got = CrossEntropyLoss(chunk_bytes=1e6)(rows(data))
    logp_TV = torch.log_softmax(data.student_TH @ data.weight_VH.T, 1)
    loss_T = -logp_TV.gather(1, data.ids_T[:, None])[:, 0]
    assert relative(got.loss_T, loss_T) <= 1e-12
    assert got.sums.keys() == {"student_entropy", "divergence_other"}
    assert relative(got.sums["divergence_other"], loss_T) <= 1e-12
    assert relative(got.sums["student_entropy"], -(logp_TV.exp() * logp_TV).sum(1)) <= 1e-12
    assert got.carries_loss_T.all()
    assert not got.selected_T.any()
    assert got.kept.keys() == {"student_entropy", "divergence"}
    assert relative(got.kept["divergence"], loss_T) <= 1e-12
