"""Tokens drawn from given logits: the tokens of the rule in numpy, and which draws sort the vocabulary.

Axes: R rows, V vocabulary.
"""

import numpy as np
import pytest
import torch

from megatron_paint.mcore import nucleus, sampling
from megatron_paint.mcore.sampling import choose_tokens, draw_sorted
from megatron_paint.rollouts.engine import SamplingParameters
from tests.mcore.sampling_cases import REAL, ROWS, normal, wanted_tokens


def parameters(*, temperature=1.0, top_p=1.0, top_k=0):
    return SamplingParameters(max_new_tokens=1, temperature=temperature, top_p=top_p, top_k=top_k, stop_ids=frozenset())


def uniforms(count, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).random(count))


def check(logits_RV, uniform_R, asked):
    """The tokens are those of numpy and of the sorted rule; log-probabilities equal torch's to the bit."""
    logp_RV = (logits_RV / asked.temperature).log_softmax(-1)
    token_R, logp_R = choose_tokens(logits_RV.clone(), uniform_R=uniform_R, sampling=asked)
    assert token_R.tolist() == draw_sorted(logp_RV, uniform_R, asked).tolist()
    assert torch.equal(logp_R, logp_RV.gather(1, token_R[:, None])[:, 0])
    for logp_V, uniform, token in zip(logp_RV, uniform_R.tolist(), token_R.tolist(), strict=True):
        low, high = wanted_tokens(logp_V, uniform, top_p=asked.top_p, top_k=asked.top_k)
        assert low <= token <= high


@pytest.mark.parametrize("vocabulary", [1, 2, 50, 1_000, 9_001])
@pytest.mark.parametrize("rows", ROWS)
def test_tokens_of_the_rule(rows, vocabulary):
    logits_RV = ROWS[rows](12, vocabulary)
    for top_p, top_k in ((1.0, 0), (0.95, 0), (0.5, 0), (1e-3, 0), (1.0, 20), (0.8, 20)):
        check(logits_RV, uniforms(12), parameters(top_p=top_p, top_k=top_k))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("rows", ROWS)
def test_tokens_of_the_rule_with_the_vocabulary_of_qwen3(rows, temperature):
    logits_RV = ROWS[rows](3, REAL)
    for top_p, top_k in ((0.95, 0), (1.0, 0), (0.95, 20)):
        check(logits_RV, uniforms(3), parameters(temperature=temperature, top_p=top_p, top_k=top_k))


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
@pytest.mark.parametrize("rows", ["one hot", "peaked", "equal"])
def test_ends_of_the_unit_interval(rows, uniform):
    """Equal entries: 0.5 is exactly on a boundary."""
    uniform_R = torch.full((3,), uniform, dtype=torch.float64)
    for top_p in (1.0, 0.5):
        check(ROWS[rows](3, 2**14), uniform_R, parameters(top_p=top_p))


def test_many_draws():
    logits_RV = torch.cat([normal(8, 20_000, spread=spread, seed=int(10 * spread)) for spread in (0.2, 1.5, 3, 5, 9)])
    for seed, top_p in enumerate((1.0, 0.99, 0.9, 0.3)):
        check(logits_RV, uniforms(len(logits_RV), seed), parameters(top_p=top_p, temperature=1.1))


def test_vocabulary_with_padding():
    """Tensor parallelism passes rows that are a part of longer ones."""
    padded_RV = normal(3, 9_100, spread=3.0)
    tokens = {}
    for name, logits_RV in (("part", padded_RV[:, :9_001]), ("copy", padded_RV[:, :9_001].clone())):
        tokens[name] = choose_tokens(logits_RV, uniform_R=uniforms(3), sampling=parameters(top_p=0.95))[0].tolist()
    assert tokens["part"] == tokens["copy"]


@pytest.mark.parametrize("rows", ["flat", "wide", "peaked", "half infinite"])
@pytest.mark.parametrize("top_p", [1.0, 0.95])
def test_ordinary_rows_are_not_sorted(rows, top_p, monkeypatch):
    logits_RV = ROWS[rows](8, 20_000)
    monkeypatch.setattr(sampling, "draw_sorted", None)
    choose_tokens(logits_RV, uniform_R=uniforms(8), sampling=parameters(top_p=top_p))


def test_a_peaked_row_needs_its_largest_entries_alone():
    logp_RV = normal(20, 20_000, spread=7.0).log_softmax(-1)
    token_R, sure_R = nucleus.draw_from_largest(logp_RV, uniforms(20), 0.95)
    assert sure_R.all()
    assert token_R.tolist() == draw_sorted(logp_RV, uniforms(20), parameters(top_p=0.95)).tolist()


def test_a_flat_row_has_too_many():
    logp_RV = normal(20, 20_000, spread=0.3).log_softmax(-1)
    assert not nucleus.draw_from_largest(logp_RV, uniforms(20), 0.95)[1].any()
    wanted = draw_sorted(logp_RV, uniforms(20), parameters(top_p=0.95)).tolist()
    assert [nucleus.draw_from_histogram(*row, 0.95) for row in zip(logp_RV, uniforms(20), strict=True)] == wanted


def probabilities(*values):
    """Log-probabilities [1, V] of these tokens at the ids 100, 200, ... of a vocabulary of 10,000."""
    logp_RV = torch.full((1, 10_000), -torch.inf)
    logp_RV[0, 100 : 100 * len(values) + 1 : 100] = torch.tensor(values).log()
    return logp_RV


def exact(logp_RV):
    """The probabilities, not normalised, of the float32 log-probabilities of `probabilities`."""
    return logp_RV[0, 100::100].double().exp()


def test_nucleus_that_ends_at_top_p_is_not_sure():
    """Rounding decides whether the third entry is kept."""
    logp_RV, uniform_R = probabilities(0.5, 0.25, 0.15, 0.1), torch.tensor([0.1], dtype=torch.float64)
    share = float(exact(logp_RV)[:2].sum() / exact(logp_RV).sum())
    for top_p, sure in ((share - 1e-8, True), (share, False), (share + 1e-8, True)):
        assert nucleus.draw_from_largest(logp_RV, uniform_R, top_p)[1] == sure
        assert nucleus.draw_from_histogram(logp_RV[0], uniform_R[0], top_p) == (100 if sure else None)


def test_draw_on_a_boundary_is_not_sure():
    """Top-p 0.7 keeps 0.5 and 0.25: the boundary is at about two thirds."""
    logp_RV = probabilities(0.5, 0.25, 0.15, 0.1)
    boundary = float(exact(logp_RV)[0] / exact(logp_RV)[:2].sum())
    for uniform, token in ((boundary - 1e-9, 100), (boundary, None), (boundary + 1e-9, 200)):
        uniform_R = torch.tensor([uniform], dtype=torch.float64)
        assert nucleus.draw_from_histogram(logp_RV[0], uniform_R[0], 0.7) == token
        found_R, sure_R = nucleus.draw_from_largest(logp_RV, uniform_R, 0.7)
        assert (int(found_R) if sure_R else None) == token


def test_draw_among_equal_entries_is_sure_if_their_order_is_indifferent():
    """Of 0.4, 0.2, 0.2, 0.2, top-p 0.7 keeps 0.4 at id 100 and two of the others: 0.4 is half of 0.8."""
    logp_V = probabilities(0.4, 0.2, 0.2, 0.2)[0]
    found = [
        nucleus.draw_from_histogram(logp_V, torch.tensor(uniform, dtype=torch.float64), 0.7)
        for uniform in (0.1, 0.49, 0.51, 0.74, 0.76, 0.99)
    ]
    # Low ids first: 100, 100, 200, 200, 300, 300. High ids first: 100, 100, 300, 300, 400, 400.
    assert found == [100, 100, None, None, None, None]


def test_not_a_number_is_not_sure():
    logp_RV = torch.full((1, 10_000), torch.nan)
    uniform_R = uniforms(1)
    assert not nucleus.draw_from_largest(logp_RV, uniform_R, 0.9)[1]
    assert nucleus.draw_from_histogram(logp_RV[0], uniform_R[0], 0.9) is None
    assert not nucleus.draw_from_blocks(logp_RV.double(), uniform_R)[1]


def test_frequencies():
    """Evenly spread uniform numbers draw each token as often as its probability says, after top-p."""
    uniform_R = (torch.arange(200, dtype=torch.float64) + 0.5) / 200
    logp_RV = probabilities(0.5, 0.25, 0.15, 0.1).expand(200, -1)
    for top_p, counts in ((1.0, (100, 50, 30, 20)), (0.9 - 1e-6, (111, 56, 33, 0)), (0.6, (133, 67, 0, 0))):
        token_R, _ = choose_tokens(logp_RV.clone(), uniform_R=uniform_R, sampling=parameters(top_p=top_p))
        found = torch.bincount(token_R, minlength=401)[[100, 200, 300, 400]]
        assert found.tolist() == pytest.approx(counts, abs=1)


def test_greedy():
    logits_RV = normal(10, 9_001, spread=3.0)
    token_R, logp_R = choose_tokens(logits_RV.clone(), uniform_R=uniforms(10), sampling=parameters(temperature=0.0))
    assert token_R.tolist() == logits_RV.numpy().argmax(1).tolist()
    assert torch.equal(logp_R, logits_RV.log_softmax(-1).amax(-1))
