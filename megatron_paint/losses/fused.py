"""The interpolation loss from hidden states, with a bounded number of logits. Axes: T tokens, V columns, H hidden."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from megatron_paint.config.loss import InterpolationLossConfig, Kernel
from megatron_paint.losses import checks
from megatron_paint.losses.cpu_math import settle_cpu_math
from megatron_paint.losses.elementwise.choose import choose_kernel, make_passes
from megatron_paint.losses.elementwise.interface import Passes
from megatron_paint.losses.fused_pass import FusedPass, Inputs
from megatron_paint.losses.output import InterpolationOutput
from megatron_paint.losses.output_layer.chunks import ChunkSize, chunk_size, elements_of_tile
from megatron_paint.losses.output_layer.formed_gradient import attach_gradient
from megatron_paint.losses.output_layer.products import OutputLayerGradient
from megatron_paint.losses.token_weights import token_weights
from megatron_paint.losses.vocab import VocabAxis


def fused_interpolation_loss(
    student_hidden_TH: torch.Tensor,
    output_weight_VH: torch.Tensor,
    teacher_hidden_TH: torch.Tensor,
    *,
    lengths: Sequence[int],
    config: InterpolationLossConfig,
    vocab: VocabAxis,
    chunk_tokens: int | None = None,
    chunk_bytes: float = 1e9,
    token_weight_T: torch.Tensor | None = None,
    teacher_output_weight_VH: torch.Tensor | None = None,
    full_teacher_hidden_TH: torch.Tensor | None = None,
    initial_hidden_TH: torch.Tensor | None = None,
    initial_output_weight_VH: torch.Tensor | None = None,
    rollout_keys: Sequence[int] | None = None,
    token_ids_T: torch.Tensor | None = None,
    token_temperature: float | None = None,
    kernel: Kernel = "auto",
) -> InterpolationOutput:
    """The same numbers as interpolation_loss; the forward pass computes the gradient.

    student_hidden_TH, teacher_hidden_TH, full_teacher_hidden_TH [T, H]: final hidden states at response rows, before
    the output layer; output_weight_VH [V, H]: this rank's rows of it; teacher_output_weight_VH: the teacher's, if it
    differs. bfloat16, float16, float32 or float64; logits are float32, or float64 if any input is.
    lengths: tokens of each rollout, in row order. chunk_tokens: rows at a time; None: as many as keep logits and
    temporaries within chunk_bytes (a fifth more if a rollout is cut, up to half more with elsewhere="skip").
    token_weight_T [T] multiplies loss_T, beside the weights of config.token_weight (those of token_weight="divergence"
    cost a pass more, without a gradient). rollout_keys: one int per rollout, for positions="random". token_ids_T [T],
    token_temperature (None: the loss temperature): for token_logp_T.
    initial_hidden_TH [T, H], initial_output_weight_VH (None: the student's): of the initial weights on the student's
    prompt, for support="initial" and partner="initial".
    kernel: the backend of the elementwise work; see `choose_kernel`.

    student_hidden_TH and output_weight_VH get gradients if they require them; under no_grad none is computed.
    backward accepts one factor common to all tokens and raises ValueError otherwise: pass weights of tokens as
    token_weight_T. If Megatron gave the parameter a main_grad, backward adds the weight's gradient to it, in the
    buffer's type (main_grad.py). The hidden states' gradient is summed over the vocabulary's ranks unless
    vocab.reduce_hidden_grad is False. Collectives: two per chunk, at most 60 bytes of float32 a token from each rank
    (84 with a support); one per redone chunk (two); that sum.
    Raises ValueError for arguments that do not fit together.
    """
    settle_cpu_math()
    hidden_TH, weight_VH = student_hidden_TH, output_weight_VH
    checks.check_matrix("output_weight_VH", weight_VH, "columns x hidden", like=(None, None))
    teacher_weight_VH = weight_VH if teacher_output_weight_VH is None else teacher_output_weight_VH
    initial_weight_VH = weight_VH if initial_output_weight_VH is None else initial_output_weight_VH
    for name, value in (("teacher", teacher_weight_VH), ("initial", initial_weight_VH)):
        checks.check_matrix(f"{name}_output_weight_VH", value, "columns x hidden", like=(len(weight_VH), None))
    if initial_output_weight_VH is not None:
        checks.check_initial("initial_output_weight_VH", initial_output_weight_VH, config)
    valid = vocab.valid_columns(len(weight_VH))
    inputs = Inputs(
        student_TH=hidden_TH.detach(),
        teacher_TH=teacher_hidden_TH.detach(),
        full_teacher_TH=None if full_teacher_hidden_TH is None else full_teacher_hidden_TH.detach(),
        initial_TH=None if initial_hidden_TH is None else initial_hidden_TH.detach(),
        weight_VH=weight_VH.detach()[:valid],
        teacher_weight_VH=teacher_weight_VH.detach()[:valid],
        initial_weight_VH=initial_weight_VH.detach()[:valid],
        dtype=checks.compute_dtype(
            hidden_TH,
            weight_VH,
            teacher_hidden_TH,
            teacher_weight_VH,
            full_teacher_hidden_TH,
            *((initial_hidden_TH, initial_weight_VH) if config.needs_initial else ()),
        ),
        token_weight_T=None if token_weight_T is None else token_weight_T.detach(),
        token_ids_T=token_ids_T,
        token_temperature=config.temperature if token_temperature is None else token_temperature,
        lengths=checks.checked_lengths(lengths, len(hidden_TH)),
        rollout_keys=rollout_keys,
        config=config,
        vocab=vocab,
    )
    _check(inputs, columns=len(weight_VH))
    gradient, wants = None, (hidden_TH.requires_grad, weight_VH.requires_grad)
    if torch.is_grad_enabled() and any(wants):
        gradient = OutputLayerGradient(hidden_TH, weight_VH, columns=valid, dtype=inputs.dtype, wants=wants)
    dlogits_dtype = inputs.dtype if gradient is None else gradient.dlogits_dtype
    given = (chunk_tokens, chunk_bytes, kernel)
    size, passes = _size_and_passes(inputs, *given, columns=len(weight_VH), dlogits_dtype=dlogits_dtype)
    with torch.no_grad():
        inputs = _with_token_weights(inputs, size, passes)
        output = FusedPass(inputs, size, passes, gradient, overlap=vocab.ranks > 1).run()
        if gradient is None:
            return output
        if gradient.dhidden_TH is not None and vocab.reduce_hidden_grad:
            vocab.sum_in_place(gradient.dhidden_TH)
    loss_T = attach_gradient(output.loss_T, hidden_TH=hidden_TH, weight_VH=weight_VH, gradient=gradient)
    return replace(output, loss_T=loss_T)


def _with_token_weights(inputs: Inputs, size: ChunkSize, passes: Passes) -> Inputs:
    """The inputs with the weights of config.token_weight multiplied in.

    Weights by divergence need all divergences of a rollout before its gradient: one more pass, without a gradient.
    """
    config = inputs.config
    if config.token_weight == "uniform":
        return inputs
    divergence_T, like = None, inputs.student_TH.new_empty(len(inputs.student_TH), dtype=inputs.dtype)
    if config.token_weight == "divergence":
        divergence_T = FusedPass(inputs, size, passes, None, overlap=inputs.vocab.ranks > 1).run().divergence_T
    weight_T = token_weights(divergence_T, inputs.lengths, config, like=like)
    given_T = inputs.token_weight_T
    return replace(inputs, token_weight_T=weight_T if given_T is None else weight_T * given_T.to(like))


def _size_and_passes(
    inputs: Inputs,
    chunk_tokens: int | None,
    chunk_bytes: float,
    kernel: Kernel,
    *,
    columns: int,
    dlogits_dtype: torch.dtype,
) -> tuple[ChunkSize, Passes]:
    """How many tokens' logits exist at a time, and the backend of the elementwise work on them."""
    device, vocab = inputs.student_TH.device, inputs.vocab
    chosen = choose_kernel(kernel, device=device, dtype=inputs.dtype)
    logits = 2 + (inputs.full_teacher_TH is not None) + (inputs.initial_TH is not None)
    buffers = logits * (2 if vocab.ranks > 1 else 1) + (chosen == "triton")
    size = chunk_size(
        chunk_tokens,
        chunk_bytes,
        columns=vocab.widest(columns),
        buffers=buffers,
        dtype=inputs.dtype,
        device=device,
    )
    elements = elements_of_tile(size, device)
    return size, make_passes(chosen, inputs.config, elements=elements, dlogits_dtype=dlogits_dtype)


def _check(inputs: Inputs, *, columns: int) -> None:
    """ValueError unless the arguments fit together; columns: the output weight's rows, padding included."""
    tokens, axes = len(inputs.student_TH), "tokens x hidden"
    weight_VH, teacher_weight_VH = inputs.weight_VH, inputs.teacher_weight_VH
    checks.check_matrix("student_hidden_TH", inputs.student_TH, axes, like=(None, weight_VH.shape[1]))
    checks.check_matrix("teacher_hidden_TH", inputs.teacher_TH, axes, like=(tokens, teacher_weight_VH.shape[1]))
    checks.check_full_teacher("full_teacher_hidden_TH", inputs.full_teacher_TH, inputs.config)
    if inputs.full_teacher_TH is not None:
        like = (tokens, teacher_weight_VH.shape[1])
        checks.check_matrix("full_teacher_hidden_TH", inputs.full_teacher_TH, axes, like=like)
    checks.check_initial("initial_hidden_TH", inputs.initial_TH, inputs.config)
    if inputs.initial_TH is not None:
        like = (tokens, inputs.initial_weight_VH.shape[1])
        checks.check_matrix("initial_hidden_TH", inputs.initial_TH, axes, like=like)
    checks.check_vector("token_weight_T", inputs.token_weight_T, tokens)
    checks.check_temperature("token_temperature", inputs.token_temperature)
    checks.check_token_ids(inputs.token_ids_T, tokens, vocab=inputs.vocab, columns=columns)
