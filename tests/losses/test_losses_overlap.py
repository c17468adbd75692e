"""No product waits for a collective: the order in which a sharded call starts and awaits its work."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from megatron_paint.losses import WholeVocab, fused_interpolation_loss, token_logprobs
from megatron_paint.losses.output_layer import products as gemm
from tests.losses.losses_cases import CASES, make_data
from tests.losses.losses_compare import relative


@dataclass(frozen=True, kw_only=True)
class _Recorded(WholeVocab):
    """A whole vocabulary that passes for two ranks' and writes down what happens when."""

    events: list[str] = field(default_factory=list)

    ranks = 2

    def _started(self, name: str, values: torch.Tensor):
        self.events.append(f"start {name}")

        def wait() -> torch.Tensor:
            self.events.append(f"wait {name}")
            return values

        return wait

    def start_gather(self, values: torch.Tensor):
        return self._started("gather", values.unsqueeze(0))

    def start_sum(self, values: torch.Tensor):
        return self._started("sum", values)


START = ["logits", "logits", "start gather"]
BETWEEN = ["wait gather", "start sum", *START, "wait sum", "gradient"]
# The logits that decide the support come first, and their maximum goes with the sums of the chunk before.
SUPPORT_START = ["logits", "logits", "logits", "start gather"]
SUPPORT_BETWEEN = [
    "wait gather",
    "logits",
    "start gather",
    "logits",
    "logits",
    "wait gather",
    "start gather",
    "gradient",
]
END = ["wait gather", "start sum", "wait sum", "gradient"]


@pytest.mark.parametrize(
    ("name", "events"),
    [
        ("clipped", [*START, *BETWEEN, *BETWEEN, *END]),
        ("clipped-support", [*SUPPORT_START, *SUPPORT_BETWEEN, *SUPPORT_BETWEEN, *END]),
    ],
)
def test_products_run_while_collectives_do(monkeypatch, name, events):
    """Behind each collective but the first stand products: the next chunk's logits, or this chunk's gradient."""
    case = CASES[name]
    data = make_data(case, torch.float64)
    vocab = _Recorded()
    project, put = gemm.Projection.__call__, gemm.OutputLayerGradient.put
    monkeypatch.setattr(gemm.Projection, "__call__", lambda *a: vocab.events.append("logits") or project(*a))
    monkeypatch.setattr(gemm.OutputLayerGradient, "put", lambda *a: vocab.events.append("gradient") or put(*a))

    def run(vocab):
        student_TH, weight_VH = (tensor.clone().requires_grad_() for tensor in (data.student_TH, data.weight_VH))
        settings = {"lengths": data.lengths, "config": case.config, "chunk_tokens": 12, "kernel": "torch"}
        settings["initial_hidden_TH"] = data.initial_TH
        loss_T = fused_interpolation_loss(student_TH, weight_VH, data.teacher_TH, vocab=vocab, **settings).loss_T
        loss_T.sum().backward()
        return loss_T, student_TH.grad, weight_VH.grad

    found = run(vocab)
    # Rollouts of 7, 1, 12 and 3 tokens: chunks of 8, 12 and 3.
    assert vocab.events == events
    vocab.events.clear()
    assert all(relative(one, two) <= 1e-15 for one, two in zip(found, run(WholeVocab()), strict=True))


def test_products_run_while_token_statistics_travel(monkeypatch):
    """One collective a chunk, behind which the next chunk's product stands."""
    data = make_data(CASES["forward"], torch.float64)
    vocab = _Recorded()
    project, put = gemm.Projection.__call__, gemm.OutputLayerGradient.put
    monkeypatch.setattr(gemm.Projection, "__call__", lambda *a: vocab.events.append("logits") or project(*a))
    monkeypatch.setattr(gemm.OutputLayerGradient, "put", lambda *a: vocab.events.append("gradient") or put(*a))
    token_weight_T = torch.linspace(-1.0, 2.0, len(data.ids_T), dtype=torch.float64)

    def run(vocab):
        hidden_TH, weight_VH = (tensor.clone().requires_grad_() for tensor in (data.student_TH, data.weight_VH))
        settings = {"vocab": vocab, "chunk_tokens": 12, "token_weight_T": token_weight_T, "kernel": "torch"}
        logp_T = token_logprobs(hidden_TH, weight_VH, data.ids_T, **settings).logp_T
        logp_T.sum().backward()
        return logp_T, hidden_TH.grad, weight_VH.grad

    found = run(vocab)
    start = ["logits", "start gather"]
    assert vocab.events == [*start, *start, "wait gather", "gradient", "wait gather", "gradient"]
    assert all(relative(one, two) <= 1e-15 for one, two in zip(found, run(WholeVocab()), strict=True))
