"""The output weight's gradient in Megatron's buffer: float32, scaled, once a backward, never without one.

Axes: T tokens, V vocabulary, H hidden.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megatron_paint.losses import WholeVocab, fused_interpolation_loss, token_logprobs
from tests.losses.losses_cases import CASES, make_data
from tests.losses.losses_compare import relative
from tests.losses.losses_dense import dense_loss, dense_token_logp

NAMES = ("forward", "clipped-cut", "jsd-cut-skip", "reverse-padded")


def _parameter(weight_VH: torch.Tensor, *, tied: bool = False, start: float = 0.0) -> torch.nn.Parameter:
    """A parameter as Megatron's data-parallel wrapper leaves it, with its hook; start: what the buffer held before."""
    parameter = torch.nn.Parameter(weight_VH.clone())
    parameter.main_grad = torch.full(weight_VH.shape, start, dtype=torch.float32)
    parameter.grad_added_to_main_grad = False
    parameter.zero_out_wgrad = tied
    accumulate = parameter.expand_as(parameter).grad_fn.next_functions[0][0]

    def hook(*_) -> None:
        # The wrapper's rule, gradients reduced during backward: there has to be one, and it counts unless it was added.
        assert parameter.grad is not None
        if not parameter.grad_added_to_main_grad or parameter.zero_out_wgrad:
            parameter.main_grad.add_(parameter.grad)
        parameter.grad = None

    accumulate.register_hook(hook)
    parameter.kept_alive = accumulate
    return parameter


def _loss(case, data, weight_VH, hidden_TH=None) -> torch.Tensor:
    return fused_interpolation_loss(
        data.student_TH.clone().requires_grad_() if hidden_TH is None else hidden_TH,
        weight_VH,
        data.teacher_TH,
        lengths=data.lengths,
        config=case.config,
        vocab=WholeVocab(valid_size=case.valid_size),
        chunk_tokens=case.chunk_tokens,
        token_weight_T=data.weight_T,
    ).loss_T.sum()


def _dense(case, data) -> torch.Tensor:
    """The weight's gradient of the summed loss in float64."""
    weight_VH, kept = data.weight_VH.double().clone().requires_grad_(), slice(0, case.valid_size)
    want = dense_loss(
        (data.student_TH.double() @ weight_VH.T)[:, kept],
        (data.teacher_TH.double() @ weight_VH.T)[:, kept],
        lengths=data.lengths,
        config=case.config,
        weight_T=None if data.weight_T is None else data.weight_T.double(),
    )
    return torch.autograd.grad(want.loss_T.sum(), weight_VH)[0]


@pytest.mark.parametrize("name", NAMES)
def test_buffer_gets_the_gradient_in_float32(name):
    """bfloat16 weights: what autograd carries is rounded to 8 bits, what the buffer gets is not."""
    case = CASES[name]
    data = make_data(case, torch.bfloat16)
    parameter, want_VH = _parameter(data.weight_VH), _dense(case, data)
    _loss(case, data, parameter).backward()
    assert relative(parameter.main_grad, want_VH) <= 5e-6
    plain_VH = data.weight_VH.clone().requires_grad_()
    _loss(case, data, plain_VH).backward()
    assert relative(plain_VH.grad, want_VH) > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_micro_batches_and_loss_scale_add_up(name):
    """Three micro-batches under a loss scale, on top of what the buffer held; the second has no tokens."""
    case, scale = CASES[name], 1024.0
    batches = [
        make_data(case, torch.float32, seed, lengths) for seed, lengths in ((0, (7, 1, 12, 3)), (1, ()), (2, (9,)))
    ]
    for batch in batches:
        batch.weight_VH = batches[0].weight_VH
    parameter = _parameter(batches[0].weight_VH, start=3.0)
    for batch in batches:
        (_loss(case, batch, parameter) * scale).backward()
    want_VH = sum(_dense(case, batch) for batch in batches if batch.lengths)
    assert relative((parameter.main_grad.double() - 3.0) / scale, want_VH) <= 5e-6


def test_tied_embedding_counts_once():
    """The embedding's gradient comes by autograd, the output layer's by the buffer; both are there once."""
    case = CASES["clipped"]
    data = make_data(case, torch.float32)
    parameter = _parameter(data.weight_VH, tied=True)
    for _ in range(2):
        hidden_TH = data.student_TH + parameter[data.ids_T]
        _loss(case, data, parameter, hidden_TH).backward()
    whole_VH = data.weight_VH.double().clone().requires_grad_()
    logits_TV = (data.student_TH.double() + whole_VH[data.ids_T]) @ whole_VH.T
    teacher_TV = data.teacher_TH.double() @ whole_VH.T
    dense_loss(logits_TV, teacher_TV, lengths=data.lengths, config=case.config).loss_T.sum().backward()
    assert relative(parameter.main_grad, 2.0 * whole_VH.grad) <= 5e-6


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_adds_once(reentrant):
    case = CASES["clipped-cut"]
    data = make_data(case, torch.float32)
    parameter = _parameter(data.weight_VH)
    hidden_TH = data.student_TH.clone().requires_grad_()
    loss = checkpoint(lambda h_TH: _loss(case, data, parameter, h_TH), hidden_TH, use_reentrant=reentrant)
    loss.backward()
    assert relative(parameter.main_grad, _dense(case, data)) <= 5e-6


def test_nothing_is_added_without_a_backward():
    case = CASES["clipped"]
    data = make_data(case, torch.float32)
    parameter = _parameter(data.weight_VH)
    with torch.no_grad():
        _loss(case, data, parameter)
    loss = _loss(case, data, parameter)
    frozen = _parameter(data.weight_VH).requires_grad_(False)
    _loss(case, data, frozen).backward()
    assert loss.requires_grad
    for untouched in (parameter, frozen):
        assert untouched.main_grad.eq(0.0).all()
        assert not untouched.grad_added_to_main_grad


@pytest.mark.parametrize("weighted", [True, False])
def test_token_logprobs_use_the_buffer(weighted):
    data = make_data(CASES["forward"], torch.float32)
    parameter = _parameter(data.weight_VH)
    weight_T = torch.linspace(-1.0, 2.0, len(data.ids_T))
    given = {"token_weight_T": weight_T} if weighted else {}
    scored = token_logprobs(
        data.student_TH.clone().requires_grad_(), parameter, data.ids_T, vocab=WholeVocab(), chunk_tokens=5, **given
    )
    (scored.logp_T if weighted else scored.logp_T * weight_T).sum().backward()
    whole_VH = data.weight_VH.double().clone().requires_grad_()
    (dense_token_logp(data.student_TH.double() @ whole_VH.T, data.ids_T, 1.0) * weight_T).sum().backward()
    assert relative(parameter.main_grad, whole_VH.grad) <= 5e-6
    assert parameter.grad is None
