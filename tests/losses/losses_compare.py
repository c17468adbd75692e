"""Runs a case through the package on one vocabulary axis and measures how far it is from the dense loss.

Axes: T tokens, V this rank's columns, H hidden.
"""

from __future__ import annotations

import torch

from megatron_paint.losses import fused_interpolation_loss, interpolation_loss, token_logprobs
from tests.losses.losses_cases import LOGPROB_CASES, Case, make_data
from tests.losses.losses_dense import dense_entropy, dense_loss, dense_token_logp

VALUES = ("loss_T", "student_entropy_T", "teacher_entropy_T", "divergence_T", "clipped_share_T")
EXACT = ("selected_T", "clipped_entries_T", "carries_loss_T")
# The loss is summed and scaled, so that backward has a factor to apply.
FACTOR = 0.125


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """|got - want| / |want| in float64; the bare distance where want is 0."""
    got, want = got.detach().double(), want.detach().double()
    scale = float(want.norm())
    return float((got - want).norm()) / (scale if scale > 1e-14 else 1.0)


def measure_case(case: Case, dtype: torch.dtype, vocab, columns: slice) -> dict[str, float]:
    """Relative errors of reference, fused loss and token log-probabilities on this rank's columns."""
    data, want = make_data(case, dtype), dense_case(case, dtype)
    mine = (want.output, want.dlogits_TV[:, columns], want.dhidden_TH, want.dweight_VH[columns])
    errors = {f"reference {key}": value for key, value in _measure_reference(case, data, vocab, columns, mine).items()}
    errors |= {f"fused {key}": value for key, value in _measure_fused(case, data, vocab, columns, mine).items()}
    if case.name in LOGPROB_CASES:
        errors |= {f"logprobs {key}": value for key, value in measure_logprobs(case, data, vocab, columns).items()}
    return errors


def dense_case(case: Case, dtype: torch.dtype):
    """The dense outcome of a case, with the gradients of logits, hidden states and weight."""
    data = make_data(case, dtype)
    student_TH, weight_VH = (
        data.student_TH.double().clone().requires_grad_(),
        data.weight_VH.double().clone().requires_grad_(),
    )
    teacher_weight_VH = weight_VH if data.own_VH is None else data.own_VH.double()
    initial_weight_VH = weight_VH if data.own_initial_VH is None else data.own_initial_VH.double()
    logits_TV = student_TH @ weight_VH.T
    logits_TV.retain_grad()
    valid = slice(0, case.valid_size)
    output = dense_loss(
        logits_TV[:, valid],
        (data.teacher_TH.double() @ teacher_weight_VH.T)[:, valid],
        lengths=data.lengths,
        config=case.config,
        full_teacher_TV=None if data.full_TH is None else (data.full_TH.double() @ teacher_weight_VH.T)[:, valid],
        initial_TV=None if data.initial_TH is None else (data.initial_TH.double() @ initial_weight_VH.T)[:, valid],
        keys=data.keys,
        weight_T=None if data.weight_T is None else data.weight_T.double(),
    )
    output.token_logp_T = dense_token_logp(
        logits_TV.detach()[:, valid], data.ids_T, case.token_temperature or case.config.temperature
    )
    (output.loss_T.sum() * FACTOR).backward()
    output.dlogits_TV, output.dhidden_TH, output.dweight_VH = logits_TV.grad, student_TH.grad, weight_VH.grad
    output.output = output
    return output


def _common(case: Case, data, vocab) -> dict:
    return {
        "lengths": data.lengths,
        "config": case.config,
        "vocab": vocab,
        "rollout_keys": data.keys,
        "token_weight_T": data.weight_T,
        "token_ids_T": data.ids_T,
        "token_temperature": case.token_temperature,
    }


def _value_errors(got, want) -> dict[str, float]:
    if got.outside_mass_T is None:
        assert got.support_size_T is None
        support = {"support_size_T": float(want.support_size_T.abs().sum())}
    else:
        # A share of the target: its error counts against 1.
        support = {"outside_mass_T": float((got.outside_mass_T - want.outside_mass_T).abs().max())}
        support["support_size_T"] = float((got.support_size_T != want.support_size_T).sum())
    errors = {name: relative(getattr(got, name), getattr(want, name)) for name in (*VALUES, "token_logp_T")} | support
    return errors | {name: float((getattr(got, name) != getattr(want, name)).sum()) for name in EXACT}


def _measure_reference(case: Case, data, vocab, columns: slice, mine) -> dict[str, float]:
    # Logits in float64 from float32 inputs would be another test: the reference gets what the inputs' type gives.
    want, dlogits_TV, _, _ = mine
    weight_VH = data.weight_VH[columns]
    teacher_VH = weight_VH if data.own_VH is None else data.own_VH[columns]
    initial_VH = weight_VH if data.own_initial_VH is None else data.own_initial_VH[columns]
    student_TV = (data.student_TH @ weight_VH.T).requires_grad_()
    output = interpolation_loss(
        student_TV,
        data.teacher_TH @ teacher_VH.T,
        full_teacher_logits_TV=None if data.full_TH is None else data.full_TH @ teacher_VH.T,
        initial_logits_TV=None if data.initial_TH is None else data.initial_TH @ initial_VH.T,
        **_common(case, data, vocab),
    )
    (output.loss_T.sum() * FACTOR).backward()
    return _value_errors(output, want) | {"dlogits": relative(student_TV.grad, dlogits_TV)}


def _measure_fused(case: Case, data, vocab, columns: slice, mine) -> dict[str, float]:
    want, _, dhidden_TH, dweight_VH = mine
    student_TH = data.student_TH.detach().clone().requires_grad_()
    weight_VH = data.weight_VH[columns].detach().clone().requires_grad_()
    output = fused_interpolation_loss(
        student_TH,
        weight_VH,
        data.teacher_TH,
        chunk_tokens=case.chunk_tokens,
        teacher_output_weight_VH=None if data.own_VH is None else data.own_VH[columns],
        full_teacher_hidden_TH=data.full_TH,
        initial_hidden_TH=data.initial_TH,
        initial_output_weight_VH=None if data.own_initial_VH is None else data.own_initial_VH[columns],
        **_common(case, data, vocab),
    )
    (output.loss_T.sum() * FACTOR).backward()
    errors = _value_errors(output, want)
    errors["dhidden"] = relative(student_TH.grad, dhidden_TH)
    errors["dweight"] = relative(weight_VH.grad, dweight_VH)
    return errors


def measure_logprobs(case: Case, data, vocab, columns: slice) -> dict[str, float]:
    """Without weights under an uneven gradient, and with weights under an even one."""
    temperature = case.config.temperature
    uneven_T = torch.linspace(-1.0, 2.0, len(data.ids_T), dtype=torch.float64)
    full_TH, full_VH = (
        data.student_TH.double().clone().requires_grad_(),
        data.weight_VH.double().clone().requires_grad_(),
    )
    logits_TV = (full_TH @ full_VH.T)[:, : case.valid_size]
    want_T = dense_token_logp(logits_TV, data.ids_T, temperature)
    entropy_T = dense_entropy(logits_TV.detach() / temperature)
    (want_T * uneven_T).sum().backward()
    errors = {}
    for name, weight_T in (("plain", None), ("weighted", uneven_T)):
        hidden_TH = data.student_TH.detach().clone().requires_grad_()
        weight_VH = data.weight_VH[columns].detach().clone().requires_grad_()
        got = token_logprobs(
            hidden_TH,
            weight_VH,
            data.ids_T,
            vocab=vocab,
            temperature=temperature,
            chunk_tokens=case.chunk_tokens,
            token_weight_T=weight_T,
        )
        (got.logp_T.sum() if name == "weighted" else (got.logp_T * uneven_T).sum()).backward()
        errors[f"{name} logp"] = relative(got.logp_T, want_T if weight_T is None else want_T * weight_T)
        errors[f"{name} entropy"] = relative(got.entropy_T, entropy_T)
        errors[f"{name} dhidden"] = relative(hidden_TH.grad, full_TH.grad)
        errors[f"{name} dweight"] = relative(weight_VH.grad, full_VH.grad[columns])
    return errors
