"""What a display sees while weights are loaded and tokens are sampled."""

import pytest
import torch

from megatron_paint.mcore.generate import MegatronSampler
from megatron_paint.mcore.hf_checkpoint import _counted
from megatron_paint.records import Rollout
from megatron_paint.rollouts.engine import GenerationRequest, SamplingParameters
from megatron_paint.runtime.work import work_now


def test_sampling_counts_tokens_and_lowers_the_most_that_can_come(monkeypatch):
    lengths = {"a": 3, "b": 5, "c": 2}
    seen = []

    def decode(self, requests, sampling, tokens):
        assert tokens is work_now()
        tokens.advance(6)  # rows of a batch are decoded until the last one ends
        seen.append((tokens.done, tokens.total))
        return [
            Rollout(problem_id=one.problem_id, prompt_ids=(1,), response_ids=(7,) * lengths[one.problem_id])
            for one in requests
        ]

    monkeypatch.setattr(MegatronSampler, "_decode", decode)
    monkeypatch.setattr(MegatronSampler, "_batches", lambda self, numbered, most: [numbered[:2], numbered[2:]])
    requests = [GenerationRequest(problem_id=name, sample_index=0, prompt_ids=(1,), key=1) for name in lengths]
    sampling = SamplingParameters(max_new_tokens=10, temperature=1.0, top_p=1.0, top_k=0, stop_ids=frozenset({2}))
    rollouts = object.__new__(MegatronSampler)._generate(requests, sampling)
    assert [len(one.response_ids) for one in rollouts] == [3, 5, 2]
    # First batch: at most 3 x 10 tokens. After it 8 are known, and one response of at most 10 is left.
    assert seen == [(6, 30), (14, 18)]
    assert work_now() is None


def test_weights_are_counted_in_bytes():
    named = [("a", torch.zeros(4)), ("b", torch.zeros(2, dtype=torch.bfloat16))]
    done = [(name, work_now().done, work_now().total) for name, _ in _counted(named, "loading")]
    assert done == [("a", 0, 20), ("b", 16, 20)]
    assert work_now() is None


def test_an_error_while_weights_are_loaded_ends_the_work():
    def load():
        for _ in _counted([("a", torch.zeros(4))], "loading"):
            raise ValueError("x")

    with pytest.raises(ValueError, match="x"):
        load()
    assert work_now() is None
