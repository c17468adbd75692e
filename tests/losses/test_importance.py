"""Importance weights of responses that older weights have sampled."""

import dataclasses
import itertools
import math

import pytest
import torch

from megatron_paint.losses import InterpolationLossConfig, WholeVocab, fused_interpolation_loss
from megatron_paint.losses.importance import prefix_weights
from megatron_paint.losses.objectives import DistillationLoss
from tests.losses.losses_cases import Case, make_data
from tests.losses.losses_compare import relative
from tests.losses.test_losses_objectives import rows

VOCAB, LENGTH = 3, 4


class Tabular:
    """A model of 3 tokens with its own logits after each of the prefixes of up to 3 tokens."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        prefixes = [p for n in range(LENGTH) for p in itertools.product(range(VOCAB), repeat=n)]
        self.logits = {p: torch.randn(VOCAB, generator=generator, dtype=torch.float64) for p in prefixes}

    def logps(self, tokens: tuple[int, ...]) -> torch.Tensor:
        """Of each token after those before it."""
        return torch.stack([self.logits[tokens[:t]].log_softmax(0)[tokens[t]] for t in range(LENGTH)])


def expected_losses(sampled_by: Tabular, *, weights) -> torch.Tensor:
    """The sum over all responses of their probability times weight times the divergence [LENGTH] of new to teacher."""
    new, teacher = Tabular(1), Tabular(2)
    total_T = torch.zeros(LENGTH, dtype=torch.float64)
    for tokens in itertools.product(range(VOCAB), repeat=LENGTH):
        now_T, then_T = new.logps(tokens), sampled_by.logps(tokens)
        at = [(teacher.logits[tokens[:t]].log_softmax(0), new.logits[tokens[:t]].log_softmax(0)) for t in range(LENGTH)]
        loss_T = torch.stack([(q.exp() * (q - p)).sum() for q, p in at])
        total_T += then_T.sum().exp() * weights(now_T, then_T) * loss_T
    return total_T


def test_the_expected_loss_is_that_of_the_current_weights():
    """Exact, by all 81 responses. Without weights, and with those of single tokens, it is another number."""
    wanted_T = expected_losses(Tabular(1), weights=lambda now_T, then_T: torch.ones_like(now_T))
    found_T = expected_losses(
        Tabular(3), weights=lambda now_T, then_T: prefix_weights(now_T, then_T, [LENGTH], limit=math.inf)
    )
    assert relative(found_T, wanted_T) <= 1e-14
    for others in (lambda now_T, then_T: 1.0, lambda now_T, then_T: (now_T - then_T).exp()):
        assert relative(expected_losses(Tabular(3), weights=others)[1:], wanted_T[1:]) > 0.01


def test_hand_worked():
    """Ratios 2, 1/4 and 8 in the first response: products 1, 2, 1/2. The limit bounds a product and not a factor."""
    ratio_T = torch.tensor([2.0, 0.25, 8.0, 3.0, 3.0, 5.0]).log()
    weight_T = prefix_weights(ratio_T.requires_grad_(), torch.zeros(6), [3, 3], limit=4.0)
    assert weight_T.tolist() == pytest.approx([1.0, 2.0, 0.5, 1.0, 3.0, 4.0])
    assert weight_T.dtype == torch.float32
    assert not weight_T.requires_grad
    assert prefix_weights(torch.zeros(0), torch.zeros(0), [], limit=2.0).shape == (0,)


@pytest.mark.parametrize("limit", [1.3, None])
def test_the_loss_has_the_weights(limit):
    """Values and gradient are those of the fused loss with given weights. Only older responses have others than 1."""
    data = make_data(Case(name="importance"), torch.float64)
    given = rows(data)
    logp_TV = torch.log_softmax(data.student_TH @ data.weight_VH.T / 0.8, 1)
    logp_T = logp_TV.gather(1, data.ids_T[:, None])[:, 0].detach()
    then_T = logp_T + 0.4 * torch.randn(len(logp_T), dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    older = [index % 2 == 0 for index in range(len(given.samples))]
    parts = then_T.split(list(data.lengths))
    samples = tuple(
        dataclasses.replace(sample, old_logprobs=tuple(part.tolist()) if is_older else None)
        for sample, part, is_older in zip(given.samples, parts, older, strict=True)
    )
    weight_T = torch.ones_like(logp_T)
    if limit is not None:
        products = [
            (now_T - part_T).cumsum(0).roll(1).index_fill(0, torch.tensor([0]), 0.0).exp().clamp(max=limit)
            if is_older
            else torch.ones_like(part_T)
            for now_T, part_T, is_older in zip(logp_T.split(list(data.lengths)), parts, older, strict=True)
        ]
        weight_T = torch.cat(products)
        assert (weight_T == limit).any()
        assert (weight_T < 1).any()
    hidden_TH = data.student_TH.detach().requires_grad_()
    config = InterpolationLossConfig(fraction=0.3)
    loss = DistillationLoss(config=config, chunk_bytes=1e6, token_temperature=0.8, importance_limit=limit)
    got = loss(dataclasses.replace(given, samples=samples, student_hidden_NH=hidden_TH))
    (got_TH,) = torch.autograd.grad(got.loss_T.sum(), hidden_TH)
    want = fused_interpolation_loss(
        hidden_TH,
        data.weight_VH.detach(),
        data.teacher_TH.detach(),
        lengths=data.lengths,
        config=config,
        vocab=WholeVocab(),
        token_weight_T=weight_T,
    )
    (want_TH,) = torch.autograd.grad(want.loss_T.sum(), hidden_TH)
    assert relative(got.loss_T, want.loss_T) <= 1e-12
    assert relative(got_TH, want_TH) <= 1e-12
    if limit is None:
        assert "importance" not in got.sums
    else:
        assert relative(got.sums["importance"], weight_T) <= 1e-12
        assert got.sums["importance_limited"].equal(weight_T == limit)
