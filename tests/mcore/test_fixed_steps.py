"""Decoding steps in fixed tensors: the tokens of the usual steps, few captures, and only fixed tensors in a replay."""

from itertools import pairwise, product

import pytest
import torch

from megatron_paint.mcore.fixed_steps import FixedSteps
from tests.mcore import parity_cases as parity
from tests.mcore.eager_capture import EagerCapture
from tests.mcore.fixed_steps_worker import BUCKETS
from tests.mcore.generation_cases import LENGTHS, SAMPLING
from tests.mcore.layouts import run_worker

LAYOUTS = ("tp1", "tp2-dp2", "cp2-dp2")


@pytest.fixture(scope="module", params=LAYOUTS)
def found(request, checkpoints, tmp_path_factory):
    out = tmp_path_factory.mktemp(request.param) / "rollouts.pt"
    run_worker("fixed_steps_worker", request.param, parity.checkpoint(checkpoints, "start", tied=True), out)
    return {"layout": request.param, **torch.load(out, weights_only=False)}


def test_tokens_are_those_of_the_usual_steps(found):
    """At one rank for every size of a bucket."""
    assert found["buckets"] == (BUCKETS if found["layout"] == "tp1" else (4,))
    for case, bucket in product(SAMPLING, found["buckets"]):
        usual, fixed = found[case, "usual"], found[case, bucket]
        assert [rollout.response_ids for rollout in fixed] == [rollout.response_ids for rollout in usual], case
        assert [rollout.finished for rollout in fixed] == [rollout.finished for rollout in usual]
        for one, other in zip(fixed, usual, strict=True):
            # More masked positions change the order in which a CPU adds up.
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


def test_one_capture_for_each_bucket_and_number_of_rows(found):
    compacted = 0
    for case in SAMPLING:
        for bucket in found["buckets"]:
            steps, captures, replays = found[case, bucket, "captured"]
            ends = [end for _, buckets in steps for end in buckets]
            assert captures == len(ends)
            assert replays >= captures
            longest = max(LENGTHS) + 24 - 1
            assert all(end % bucket == 0 or end <= longest for end in ends)
            if bucket == 256:  # the cache is shorter than that
                assert all(len(buckets) <= 1 for _, buckets in steps)
            if bucket == 4:
                assert any(len(buckets) > 2 for _, buckets in steps)
                assert replays > 2 * captures
            rows = [count for count, _ in steps]
            compacted += sum(after <= before / 2 for before, after in pairwise(rows))
    if found["layout"] == "tp1":  # rows that have finished are dropped, and their steps are captured again
        assert compacted


def steps_of(step, *, bucket, length=20, rows=2):
    capture = EagerCapture()
    device = torch.device("cpu")
    return FixedSteps(step, rows=rows, length=length, device=device, capture=capture, bucket=bucket), capture


def test_a_step_gets_the_same_tensors_each_time():
    """With the values of the call; the result has one place for each bucket, too."""
    seen = []

    def step(input_L, position_L, end):
        seen.append((input_L.data_ptr(), position_L.data_ptr()))
        return 100 * input_L + 10 * position_L + end

    steps, capture = steps_of(step, bucket=8)
    first = steps(torch.tensor([1, 2]), torch.tensor([3, 4]), 5)
    assert first.tolist() == [138, 248]
    second = steps(torch.tensor([5, 6]), torch.tensor([6, 7]), 8)
    assert second.tolist() == [568, 678]
    assert second.data_ptr() == first.data_ptr()
    assert (capture.captures, capture.replays) == (1, 2)
    assert len(set(seen)) == 1
    other = steps(torch.tensor([7, 8]), torch.tensor([8, 7]), 9)
    assert other.tolist() == [796, 886]
    assert (capture.captures, capture.replays) == (2, 3)
    assert other.data_ptr() != second.data_ptr()


@pytest.mark.parametrize(("end", "covered"), [(1, 8), (8, 8), (9, 16), (16, 16), (17, 20), (20, 20)])
def test_a_bucket_covers_the_positions_and_ends_with_the_cache(end, covered):
    steps, _ = steps_of(lambda input_L, position_L, end: torch.full((2,), end), bucket=8)
    assert steps(torch.zeros(2).long(), torch.zeros(2).long(), end).tolist() == [covered] * 2
