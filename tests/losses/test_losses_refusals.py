"""Settings and calls that are refused, each with what was got and what to do.

Axes: T tokens, V vocabulary, H hidden.
"""

from __future__ import annotations

import math
import subprocess
import sys
from typing import get_args

import pytest
import torch

from megatron_paint.config.loss import Divergence
from megatron_paint.losses import (
    InterpolationLossConfig,
    ShardedVocab,
    WholeVocab,
    fused_interpolation_loss,
    interpolation_loss,
    token_logprobs,
)
from megatron_paint.losses.elementwise.divergences import DIVERGENCES, coefficient_is_one, finish, take_terms
from megatron_paint.losses.elementwise.torch_backend import TorchPasses


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"divergence": "kl"}, "divergence"),
        ({"partner": "teacher"}, "partner"),
        ({"positions": "some"}, "positions"),
        ({"mismatch": "relative"}, "mismatch"),
        ({"elsewhere": "student"}, "elsewhere"),
        ({"control": None}, "control"),
        ({"jsd_beta": 0.0}, "jsd_beta"),
        ({"jsd_beta": 1}, "jsd_beta"),
        ({"jsd_beta": math.nan}, "jsd_beta"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"temperature": "1.1"}, "temperature"),
        ({"clip": 0.0}, "clip"),
        ({"clip": True}, "clip"),
        ({"clip_rule": "entries"}, "clip_rule"),
        ({"clip": math.nan}, "clip"),
        ({"clip": 0.05, "divergence": "jsd"}, "clip"),
        ({"clip": 0.05, "divergence": "reverse_kl"}, "clip"),
        ({"weight": 1.01}, "weight"),
        ({"weight": -0.1}, "weight"),
        ({"fraction": 2}, "fraction"),
        ({"fraction": None}, "fraction"),
        ({"positions": "threshold", "threshold_nats": -0.1}, "threshold_nats"),
        ({"positions": "threshold", "threshold_nats": math.inf}, "threshold_nats"),
        ({"threshold_nats": 0.1}, "threshold_nats"),
        ({"control": "reweight", "partner": "full_teacher"}, "control"),
        ({"control": "reweight", "partner": "initial"}, "control"),
        ({"positions": "none", "partner": "initial"}, "partner"),
        ({"weight": 0.0, "partner": "initial"}, "partner"),
        ({"support": "teacher"}, "support"),
        ({"support": "initial", "divergence": "reverse_kl"}, "support"),
        ({"support": "student", "divergence": "reverse_kl"}, "support"),
        ({"support_ratio": 0.0}, "support_ratio"),
        ({"support_ratio": 1.5}, "support_ratio"),
        ({"support_ratio": math.nan}, "support_ratio"),
    ],
)
def test_settings_are_refused_by_name_and_value(settings, name):
    with pytest.raises(ValueError, match=rf"^objective\.loss\.{name}( \(.+\): got |=)") as caught:
        InterpolationLossConfig(**settings)
    assert ("nothing (null)" if settings[name] is None else str(settings[name])) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_threshold_must_be_set():
    with pytest.raises(
        ValueError, match=r"^objective\.loss\.threshold_nats is not set: positions=threshold .*; set it"
    ):
        InterpolationLossConfig(positions="threshold")


def test_every_divergence_of_the_settings_is_in_the_table_and_no_other():
    assert tuple(DIVERGENCES) == get_args(Divergence)


def test_a_divergence_that_is_not_in_the_table_is_refused_everywhere():
    """Settings check names first; past them there is one error, in every backend, the reference and the sums."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from megatron_paint.losses.elementwise.triton_backend import TritonPasses

    config = InterpolationLossConfig()
    object.__setattr__(config, "divergence", "total_variation")
    logits_TV, lengths = torch.zeros(2, 3), [2]
    calls = (
        lambda: TorchPasses(config, elements=8),
        lambda: TritonPasses(config, dlogits_dtype=torch.float32),
        lambda: take_terms(logits_TV, logits_TV, config),
        lambda: finish(logits_TV, config),
        lambda: coefficient_is_one(config),
        lambda: interpolation_loss(logits_TV, logits_TV, lengths=lengths, config=config),
        lambda: fused_interpolation_loss(
            logits_TV, torch.eye(3), logits_TV, lengths=lengths, config=config, vocab=WholeVocab()
        ),
    )
    message = "loss setting divergence: got 'total_variation'; it is one of forward_kl, reverse_kl, jsd; choose one"
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()


def test_unusual_settings_are_allowed():
    InterpolationLossConfig(temperature=1, weight=1, fraction=0, jsd_beta=0.01)
    InterpolationLossConfig(positions="threshold", threshold_nats=-0.5, mismatch="teacher_minus_student")


def test_settings_need_no_torch():
    code = "import sys; from megatron_paint.losses import InterpolationLossConfig; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def _call(**changes):
    arguments = {
        "student_hidden_TH": torch.zeros(5, 4),
        "output_weight_VH": torch.zeros(7, 4),
        "teacher_hidden_TH": torch.zeros(5, 4),
        "lengths": [2, 3],
        "config": InterpolationLossConfig(),
        "vocab": WholeVocab(),
    }
    return fused_interpolation_loss(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": [2, 2]}, "lengths: got"),
        ({"lengths": [6, -1]}, "lengths: got"),
        ({"student_hidden_TH": torch.zeros(5, 3)}, "student_hidden_TH: got shape"),
        ({"teacher_hidden_TH": torch.zeros(4, 4)}, "teacher_hidden_TH: got shape"),
        ({"student_hidden_TH": torch.zeros(5, 1, 4)}, "student_hidden_TH: got shape"),
        ({"output_weight_VH": torch.zeros(7, 4, dtype=torch.long)}, "output_weight_VH: got torch.int64"),
        ({"teacher_output_weight_VH": torch.zeros(8, 4)}, "teacher_output_weight_VH: got shape"),
        ({"full_teacher_hidden_TH": torch.zeros(5, 4)}, "full_teacher_hidden_TH: got a tensor"),
        ({"config": InterpolationLossConfig(partner="full_teacher")}, "full_teacher_hidden_TH: got nothing"),
        ({"initial_hidden_TH": torch.zeros(5, 4)}, "initial_hidden_TH: got a tensor"),
        ({"config": InterpolationLossConfig(partner="initial")}, "initial_hidden_TH: got nothing"),
        ({"config": InterpolationLossConfig(support="initial")}, "initial_hidden_TH: got nothing"),
        (
            {"config": InterpolationLossConfig(support="initial"), "initial_hidden_TH": torch.zeros(4, 4)},
            "initial_hidden_TH: got shape",
        ),
        ({"initial_output_weight_VH": torch.zeros(7, 4)}, "initial_output_weight_VH: got a tensor"),
        ({"config": InterpolationLossConfig(positions="random")}, "rollout_keys: got none"),
        ({"token_weight_T": torch.zeros(4)}, "token_weight_T: got shape"),
        ({"token_ids_T": torch.zeros(4, dtype=torch.long)}, "token_ids_T: got shape"),
        ({"token_ids_T": torch.zeros(5)}, "token_ids_T: got torch.float32"),
        ({"token_ids_T": torch.tensor([0, 1, 2, 3, 7])}, "token_ids_T: got ids from 0 to 7"),
        ({"token_ids_T": torch.tensor([-1, 1, 2, 3, 6])}, "token_ids_T: got ids from -1"),
        ({"token_ids_T": torch.arange(5) + 1, "vocab": WholeVocab(valid_size=5)}, "token_ids_T: got ids from 1 to 5"),
        ({"token_temperature": 0.0}, "token_temperature: got"),
        ({"chunk_tokens": 0}, "chunk_tokens: got"),
        ({"chunk_tokens": 1.5}, "chunk_tokens: got"),
        ({"chunk_bytes": 10.0}, "chunk_bytes: got"),
        ({"chunk_bytes": math.nan}, "chunk_bytes: got"),
        ({"vocab": WholeVocab(valid_size=8)}, "valid_size: got 8"),
        ({"vocab": ShardedVocab(None, start=0, stop=6, size=12)}, "vocabulary shard: got 7 columns"),
    ],
)
def test_calls_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        _call(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_logits_TV": torch.zeros(5, 6)}, "teacher_logits_TV: got shape"),
        ({"lengths": [4]}, "lengths: got"),
        ({"full_teacher_logits_TV": torch.zeros(5, 7)}, "full_teacher_logits_TV: got a tensor"),
        ({"config": InterpolationLossConfig(partner="full_teacher")}, "full_teacher_logits_TV: got nothing"),
        ({"initial_logits_TV": torch.zeros(5, 7)}, "initial_logits_TV: got a tensor"),
        ({"config": InterpolationLossConfig(support="initial")}, "initial_logits_TV: got nothing"),
        ({"token_ids_T": torch.full((5,), 9)}, "token_ids_T: got ids from 9 to 9"),
        ({"token_weight_T": torch.zeros(1)}, "token_weight_T: got shape"),
    ],
)
def test_reference_calls_are_refused(changes, message):
    arguments = {
        "student_logits_TV": torch.zeros(5, 7),
        "teacher_logits_TV": torch.zeros(5, 7),
        "lengths": [5],
        "config": InterpolationLossConfig(),
    }
    with pytest.raises(ValueError, match=message):
        interpolation_loss(**(arguments | changes))


def test_shards_and_sizes_are_refused():
    for start, stop, size in ((3, 3, 6), (-1, 3, 6), (4, 8, 6)):
        with pytest.raises(ValueError, match="vocabulary shard: got columns"):
            ShardedVocab(None, start=start, stop=stop, size=size)
    with pytest.raises(ValueError, match="valid_size: got 7"):
        ShardedVocab(None, start=0, stop=3, size=6, valid_size=7)
    with pytest.raises(ValueError, match="valid_size: got 0"):
        WholeVocab(valid_size=0)


def test_vocabulary_that_does_not_divide_is_refused(monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda _: 3)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda _: 2)
    with pytest.raises(ValueError, match=r"vocabulary: got 16 entries for 3 ranks.*pad the output layer"):
        ShardedVocab.evenly_cut(None, 16)
    assert ShardedVocab.evenly_cut(None, 18, valid_size=17).start == 12


def test_token_logprobs_needs_ids():
    with pytest.raises(ValueError, match="token_ids_T: got None"):
        token_logprobs(torch.zeros(5, 4), torch.zeros(7, 4), None, vocab=WholeVocab())
    with pytest.raises(ValueError, match="temperature: got -1"):
        token_logprobs(torch.zeros(5, 4), torch.zeros(7, 4), torch.arange(5), vocab=WholeVocab(), temperature=-1.0)


def test_uneven_gradients_are_refused():
    """The gradient was formed with equal factors: a mask after the fact would be wrong without a word."""
    hidden_TH = torch.randn(5, 4, requires_grad=True)
    uneven_T = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0])
    loss_T = _call(student_hidden_TH=hidden_TH, output_weight_VH=torch.randn(7, 4)).loss_T
    with pytest.raises(ValueError, match="token_weight_T"):
        (loss_T * uneven_T).sum().backward()
    weighted = token_logprobs(
        hidden_TH, torch.randn(7, 4), torch.arange(5), vocab=WholeVocab(), token_weight_T=torch.ones(5)
    )
    with pytest.raises(ValueError, match="token_weight_T"):
        (weighted.logp_T * uneven_T).sum().backward()


def test_second_backward_is_refused():
    hidden_TH = torch.randn(5, 4, requires_grad=True)
    loss = _call(student_hidden_TH=hidden_TH, output_weight_VH=torch.randn(7, 4)).loss_T.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="call the loss again"):
        loss.backward()


def test_non_finite_gradients_pass_through():
    """A loss scale that overflowed is found by the caller's check for non-finite values, not called uneven."""
    hidden_TH = torch.randn(5, 4, requires_grad=True)
    loss_T = _call(student_hidden_TH=hidden_TH, output_weight_VH=torch.randn(7, 4)).loss_T
    (loss_T.sum() * math.nan).backward()
    assert hidden_TH.grad.isnan().all()
