"""Scores of a micro-batch from per-token values worked by hand."""

import dataclasses
import math

import pytest
import torch

from megatron_paint.losses import LossOutput
from megatron_paint.mcore.batch import Assignment, make_micro_batches
from megatron_paint.mcore.scores import NonFinite, score_samples
from megatron_paint.policy import ScoredSequence
from megatron_paint.records import Problem, Rollout, Sample, SamplerGap


def micro_batches(sequences, replicas, **how):
    """Without context parallelism."""
    assignment = Assignment(replicas=replicas, owners=[0] * len(sequences))
    return make_micro_batches(sequences, assignment, context=None, device=torch.device("cpu"), **how)


def sample(name: str, *logprobs: float) -> Sample:
    response = tuple(range(1, len(logprobs) + 1))
    rollout = Rollout(problem_id=name, prompt_ids=(9,), response_ids=response, logprobs=logprobs, finished=True)
    return Sample(
        problem=Problem(id=name, problem="", solution="", answer=""),
        key=0,
        rollout=rollout,
    )


SAMPLES = (sample("a", -1.0), sample("b", -1.0, -2.0, -3.0))
# The micro-batch has the longer one first.
OUTPUT = LossOutput(
    loss_T=torch.tensor([1.0, 0.0, 4.0, 0.5]),
    carries_loss_T=torch.tensor([True, False, True, True]),
    selected_T=torch.tensor([False, True, True, False]),
    token_logp_T=torch.tensor([-1.0, -2.25, -3.0, -1.5]),
    sums={"anything": torch.tensor([1.0, 2.0, 3.0, 0.25]), "counted": torch.tensor([True, True, False, False])},
)


def scores(output: LossOutput, *, keep_logprobs: bool = False, kept: int = 0):
    sequences = [ScoredSequence(prompt_ids=s.student_prompt_ids, response_ids=s.response_ids) for s in SAMPLES]
    (batch,) = micro_batches(sequences, [[0, 1]], replica=0, limit=64, multiple=1)
    assert batch.indices == (1, 0)
    return score_samples(output, batch, SAMPLES, rank=3, keep_logprobs=keep_logprobs, kept=kept)


def test_sums_are_added_up_by_name():
    found = scores(OUTPUT)
    assert found[1].sums == {"anything": 6.0, "counted": 2.0}
    assert found[0].sums == {"anything": 0.25, "counted": 0.0}
    assert (found[1].loss_sum, found[1].num_tokens, found[1].loss_tokens, found[1].selected) == (5.0, 3, 2, (1, 2))
    assert (found[0].loss_sum, found[0].num_tokens, found[0].loss_tokens, found[0].selected) == (0.5, 1, 1, ())
    assert found[1].sampler_gap == SamplerGap(largest=0.25, position=1, total=0.25, above=1)
    assert found[0].sampler_gap == SamplerGap(largest=0.5, position=0, total=0.5, above=1)
    assert found[1].token_logprobs is None
    assert scores(OUTPUT, keep_logprobs=True)[1].token_logprobs == (-1.0, -2.25, -3.0)


def test_the_first_samples_keep_the_values_of_their_tokens():
    """Sample 1 comes first in the micro-batch: three tokens, then one of sample 0."""
    values_T = torch.tensor([0.5, 0.25, 0.125, 2.0])
    output = dataclasses.replace(OUTPUT, kept={"divergence": values_T}, per_token={"outside_mass": values_T / 2})
    none, first, both = (scores(output, kept=kept) for kept in (0, 1, 2))
    assert none[0].per_token == {"outside_mass": (1.0,)}
    assert first[0].per_token["divergence"] == (2.0,)
    assert first[1].per_token == {"outside_mass": (0.25, 0.125, 0.0625)}
    assert both[1].per_token["divergence"] == (0.5, 0.25, 0.125)
    # With its sign: trainer minus sampler.
    for index, found in both.items():
        gap = max(found.per_token["logprob_gap"], key=abs)
        assert abs(gap) == found.sampler_gap.largest, index


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_its_problem(bad):
    loss_T = OUTPUT.loss_T.clone()
    loss_T[3] = bad
    found = scores(dataclasses.replace(OUTPUT, loss_T=loss_T))
    assert found[0] == NonFinite(rank=3, micro_batch=0, problem_id="a")
    assert found[1].loss_sum == 5.0


def test_every_replica_runs_equally_many_micro_batches():
    """Two sequences of 4 tokens with a limit of 5: the replica with one of them gets an empty micro-batch too."""
    sequences = [ScoredSequence(prompt_ids=(1, 2), response_ids=(3, 4, 5))] * 3
    made = [micro_batches(sequences, [[0, 2], [1]], replica=r, limit=5, multiple=2) for r in (0, 1)]
    assert [[batch.indices for batch in batches] for batches in made] == [[(0,), (2,)], [(1,), ()]]
    assert made[1][0].predicting_N.tolist() == [1, 2, 3]
    assert made[1][0].ids_L.tolist() == [1, 2, 3, 4]
    assert (made[1][1].ids_L.tolist(), made[1][1].lengths) == ([0, 0], ())
