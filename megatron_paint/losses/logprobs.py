"""Log-probabilities of tokens from hidden states, for cross entropy and policy gradients.

Axes: T tokens, V this rank's vocabulary columns, H hidden, R ranks, K packed statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from megatron_paint.config.loss import Kernel
from megatron_paint.losses import checks
from megatron_paint.losses.cpu_math import settle_cpu_math
from megatron_paint.losses.elementwise.choose import choose_kernel, make_token_passes
from megatron_paint.losses.elementwise.softmax_statistics import (
    Softmax,
    TokenQuery,
    merge_entropy,
    merge_softmax,
    query_tokens,
)
from megatron_paint.losses.elementwise.token import TokenLogits, TokenPasses
from megatron_paint.losses.output_layer.chunks import ChunkSize, chunk_size, elements_of_tile, plan_chunks
from megatron_paint.losses.output_layer.formed_gradient import attach_gradient
from megatron_paint.losses.output_layer.products import OutputLayerGradient, Projection, inverse
from megatron_paint.losses.vocab import VocabAxis


@dataclass(frozen=True, kw_only=True)
class TokenLogprobs:
    """logp_T [T]: log-probabilities in nats, times token_weight_T if passed, differentiable; entropy_T [T]: nats."""

    logp_T: torch.Tensor
    entropy_T: torch.Tensor


def token_logprobs(
    hidden_TH: torch.Tensor,
    output_weight_VH: torch.Tensor,
    token_ids_T: torch.Tensor,
    *,
    vocab: VocabAxis,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    chunk_bytes: float = 1e9,
    token_weight_T: torch.Tensor | None = None,
    kernel: Kernel = "auto",
) -> TokenLogprobs:
    """log softmax(hidden weight^T / temperature) at each token, with a bounded number of logits at any time.

    hidden_TH [T, H]: final hidden states; output_weight_VH [V, H]: this rank's rows of the output layer;
    token_ids_T [T]: ids of the complete vocabulary. Types, chunks and kernel as in fused_interpolation_loss.
    Without token_weight_T backward accepts any gradient and computes each chunk's logits again (4 matrix products in
    total). With it logp_T is multiplied by the weights, and the forward pass computes the gradient (3 products);
    backward then accepts one factor common to all tokens and raises ValueError otherwise. Cross entropy is
    -token_logprobs(..., token_weight_T=mask).logp_T.sum().
    Collectives: one a chunk, which overlaps with the next chunk's product; one for the hidden states' gradient unless
    vocab.reduce_hidden_grad is False, in backward if there is no token_weight_T. Raises ValueError for arguments that
    do not fit together.
    """
    settle_cpu_math()
    tokens, columns = hidden_TH.shape[0], output_weight_VH.shape[0]
    checks.check_matrix("output_weight_VH", output_weight_VH, "columns x hidden", like=(None, None))
    checks.check_matrix("hidden_TH", hidden_TH, "tokens x hidden", like=(None, output_weight_VH.shape[1]))
    checks.check_vector("token_weight_T", token_weight_T, tokens)
    checks.check_temperature("temperature", temperature)
    if token_ids_T is None:
        raise ValueError("token_ids_T: got None; the log-probability is that of a token; pass one id per row")
    checks.check_token_ids(token_ids_T, tokens, vocab=vocab, columns=columns)
    dtype = checks.compute_dtype(hidden_TH, output_weight_VH)
    valid = vocab.valid_columns(columns)
    chosen = choose_kernel(kernel, device=hidden_TH.device, dtype=dtype)
    buffers = (2 if vocab.ranks > 1 else 1) + (chosen == "triton")
    head = _Head(
        hidden_TH=hidden_TH.detach(),
        weight_VH=output_weight_VH.detach()[:valid],
        dtype=dtype,
        query=query_tokens(token_ids_T, start=vocab.start, columns=valid, ratio=1.0),
        temperature=temperature,
        vocab=vocab,
        size=chunk_size(
            chunk_tokens,
            chunk_bytes,
            columns=vocab.widest(columns),
            buffers=buffers,
            dtype=dtype,
            device=hidden_TH.device,
        ),
        kernel=chosen,
    )
    wants = (hidden_TH.requires_grad, output_weight_VH.requires_grad)
    wants = wants if torch.is_grad_enabled() else (False, False)
    if token_weight_T is None and any(wants):
        logp_T, entropy_T = _TokenLogprobs.apply(hidden_TH, output_weight_VH, head)
        return TokenLogprobs(logp_T=logp_T, entropy_T=entropy_T)
    with torch.no_grad():
        gradient = None
        weight_T = None if token_weight_T is None else token_weight_T.to(dtype)
        if any(wants):
            gradient = OutputLayerGradient(hidden_TH, output_weight_VH, columns=valid, dtype=dtype, wants=wants)
        logp_T, entropy_T, _ = head.measure(weight_T, gradient)
        logp_T = logp_T if weight_T is None else logp_T * weight_T
    if gradient is not None:
        logp_T = attach_gradient(logp_T, hidden_TH=hidden_TH, weight_VH=output_weight_VH, gradient=gradient)
    return TokenLogprobs(logp_T=logp_T, entropy_T=entropy_T)


class _Visit(NamedTuple):
    """A chunk whose statistics are being gathered; gathered() waits for those of all ranks [R, T, K]."""

    rows: slice
    logits: TokenLogits
    query: TokenQuery
    gathered: Callable[[], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class _Head:
    """Checked arguments: detached, the weight without padding rows."""

    hidden_TH: torch.Tensor
    weight_VH: torch.Tensor
    dtype: torch.dtype
    query: TokenQuery
    temperature: float
    vocab: VocabAxis
    size: ChunkSize
    kernel: Literal["torch", "triton"]

    def row_chunks(self) -> list[slice]:
        tokens = self.hidden_TH.shape[0]
        return [chunk.rows for chunk in plan_chunks((tokens,), self.size.together, whole_rollouts=False)]

    def measure(
        self, weight_T: torch.Tensor | None, gradient: OutputLayerGradient | None
    ) -> tuple[torch.Tensor, torch.Tensor, Softmax]:
        """Log-probabilities, entropies and normalisers [T]; fills the gradient of sum(weight logp) if it is passed."""
        new = {"dtype": self.dtype, "device": self.hidden_TH.device}
        logp_T, entropy_T, max_T, sum_T = (torch.empty(self.hidden_TH.shape[0], **new) for _ in range(4))
        overlap = self.vocab.ranks > 1
        project, passes = self.projection(2 if overlap else 1), self.passes(gradient)
        chunks = self.row_chunks()
        visit = self.start_visit(chunks[0], project, passes) if chunks else None
        for following in (*chunks[1:], None) if chunks else ():
            rows, ahead = visit.rows, None
            if overlap and following is not None:
                ahead = self.start_visit(following, project, passes)
            local_RTK, logit_RT = visit.gathered().split([3, 1], dim=-1)
            total = merge_softmax(local_RTK[..., 0], local_RTK[..., 1])
            max_T[rows], sum_T[rows] = total
            entropy_T[rows] = merge_entropy(local_RTK, total)
            logp_T[rows] = (logit_RT.sum(0).squeeze(1) - total.max_T) - total.sum_T.log()
            if gradient is not None:
                scale_T = weight_T[rows] / self.temperature
                gradient.put(rows, passes.gradient(visit.logits, visit.query, total, scale_T))
            visit = None  # frees its logits before the next ones exist
            if following is not None and ahead is None:
                ahead = self.start_visit(following, project, passes)
            visit = ahead
        self.reduce(gradient)
        return logp_T, entropy_T, Softmax(max_T, sum_T)

    def start_visit(self, rows: slice, project: Projection, passes: TokenPasses) -> _Visit:
        logits, query = TokenLogits(values_TV=project(self.hidden_TH[rows])), self.query_of(rows)
        return _Visit(rows, logits, query, self.vocab.start_gather(passes.statistics(logits, query)))

    def fill(self, gradient: OutputLayerGradient, total: Softmax, grad_T: torch.Tensor) -> None:
        """Fills the gradient of sum(grad logp) from known normalisers."""
        project, passes = self.projection(1), self.passes(gradient)
        for rows in self.row_chunks():
            logits = TokenLogits(values_TV=project(self.hidden_TH[rows]))
            of_rows = Softmax(total.max_T[rows], total.sum_T[rows])
            scale_T = grad_T[rows] / self.temperature
            gradient.put(rows, passes.gradient(logits, self.query_of(rows), of_rows, scale_T))
            del logits
        self.reduce(gradient)

    def projection(self, buffers: int) -> Projection:
        most_rows, scale = min(self.size.tokens, len(self.hidden_TH)), inverse(self.temperature, self.dtype)
        return Projection(self.weight_VH, self.dtype, most_rows=most_rows, scale=scale, buffers=buffers)

    def passes(self, gradient: OutputLayerGradient | None) -> TokenPasses:
        dlogits_dtype = self.dtype if gradient is None else gradient.dlogits_dtype
        elements = elements_of_tile(self.size, self.hidden_TH.device)
        return make_token_passes(self.kernel, elements=elements, dlogits_dtype=dlogits_dtype)

    def query_of(self, rows: slice) -> TokenQuery:
        return TokenQuery(self.query.column_T[rows], self.query.here_T[rows], self.query.ratio)

    def reduce(self, gradient: OutputLayerGradient | None) -> None:
        if gradient is not None and gradient.dhidden_TH is not None and self.vocab.reduce_hidden_grad:
            self.vocab.sum_in_place(gradient.dhidden_TH)


class _TokenLogprobs(torch.autograd.Function):
    """Keeps only hidden states and normalisers; backward computes the logits again."""

    @staticmethod
    def forward(
        ctx: Any, hidden_TH: torch.Tensor, weight_VH: torch.Tensor, head: _Head
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logp_T, entropy_T, total = head.measure(None, None)
        ctx.save_for_backward(hidden_TH, weight_VH, *total)
        ctx.head, ctx.parameter_VH = head, weight_VH
        ctx.mark_non_differentiable(entropy_T)
        return logp_T, entropy_T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_T: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
        head: _Head = ctx.head
        # The saved tensors are those of head. Unpacking them lets autograd refuse weights changed since the forward.
        hidden_TH, _, *total = ctx.saved_tensors
        wants = ctx.needs_input_grad[:2]
        columns = head.weight_VH.shape[0]
        gradient = OutputLayerGradient(hidden_TH, ctx.parameter_VH, columns=columns, dtype=head.dtype, wants=wants)
        head.fill(gradient, Softmax(*total), grad_T)
        dhidden_TH, weight = gradient.dhidden_TH, gradient.weight
        return (
            None if dhidden_TH is None else dhidden_TH.to(hidden_TH.dtype),
            None if weight is None else weight.release(1.0),
            None,
        )
