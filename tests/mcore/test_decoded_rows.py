"""Rows of a batch that is decoded, and the token rows of one more token, against values worked by hand."""

import pytest
import torch

from megatron_paint.base.keys import uniforms
from megatron_paint.mcore.attention import KeyValueCache, next_token_rows
from megatron_paint.mcore.decoded_rows import DecodedRows
from megatron_paint.rollouts.engine import GenerationRequest, SamplingParameters

SAMPLING = SamplingParameters(max_new_tokens=4, temperature=1.0, top_p=1.0, top_k=0, stop_ids=frozenset({7, 9}))
CPU = torch.device("cpu")


def requests(*lengths):
    return [
        GenerationRequest(problem_id=f"p{i}", sample_index=i, prompt_ids=tuple(range(20, 20 + length)), key=100 + i)
        for i, length in enumerate(lengths)
    ]


def add(rows, *tokens):
    rows.add(torch.tensor(tokens), torch.tensor([-float(token) for token in tokens], dtype=torch.float64))


def test_a_row_ends_at_its_first_stop_token():
    rows = DecodedRows(requests(3, 1, 5), SAMPLING, CPU)
    add(rows, 1, 9, 2)
    assert rows.inputs.tolist() == [1, 9, 2]
    assert rows.positions.tolist() == [3, 1, 5]
    assert (rows.end, rows.unfinished()) == (6, [0, 2])
    add(rows, 3, 4, 7)  # the second row is finished: it repeats 9
    assert rows.inputs.tolist() == [3, 9, 7]
    assert rows.positions.tolist() == [4, 2, 6]
    assert (rows.end, rows.unfinished()) == (7, [0])
    rows.keep([0])
    assert (rows.live, rows.end) == ([0], 5)
    assert rows.uniform.tolist() == [uniforms(100, 4)[2]]
    add(rows, 5)
    add(rows, 6)
    first, second, third = rows.rollouts()
    assert (first.response_ids, first.logprobs, first.finished) == ((1, 3, 5, 6), (-1.0, -3.0, -5.0, -6.0), False)
    assert (second.response_ids, second.logprobs, second.finished) == ((9,), (-9.0,), True)
    assert (third.response_ids, third.logprobs, third.finished) == ((2, 7), (-2.0, -7.0), True)
    assert [rollout.problem_id for rollout in (first, second, third)] == ["p0", "p1", "p2"]


def test_rows_stay_with_their_random_numbers():
    rows = DecodedRows(requests(2, 2, 2, 2), SAMPLING, CPU)
    assert rows.uniform.tolist() == [uniforms(100 + i, 4)[0] for i in range(4)]
    add(rows, 7, 1, 7, 2)
    rows.keep(rows.unfinished())
    assert rows.uniform.tolist() == [uniforms(101, 4)[1], uniforms(103, 4)[1]]
    add(rows, 3, 7)
    rows.keep(rows.unfinished())
    add(rows, 4)
    assert [rollout.response_ids for rollout in rows.rollouts()] == [(7,), (1, 3, 4), (7,), (2, 7)]


def test_without_stop_ids():
    sampling = SamplingParameters(max_new_tokens=2, temperature=1.0, top_p=1.0, top_k=0, stop_ids=frozenset())
    rows = DecodedRows(requests(1, 1), sampling, CPU)
    add(rows, 7, 9)
    assert rows.unfinished() == [0, 1]
    add(rows, 7, 9)
    assert [(rollout.response_ids, rollout.finished) for rollout in rows.rollouts()] == [
        ((7, 7), False),
        ((9, 9), False),
    ]


@pytest.mark.parametrize("padding", [0, 3])
def test_token_rows_of_one_more_token(padding):
    cache = KeyValueCache(rows=2, length=8)
    rows = next_token_rows(torch.tensor([4, 2]), end=5, cache=cache, padding=padding)
    assert (rows.lengths, rows.padding, rows.end, rows.cache) == ((1, 1), padding, 5, cache)
    assert rows.row_T.tolist() == [0, 1] + [2] * padding
    assert rows.slot_T.tolist() == [0, 0, *range(padding)]
    assert rows.position_T.tolist() == [4, 2, *range(padding)]
    assert rows.begins.tolist() == ([0, 1, 2, 5] if padding else [0, 1, 2])
    assert rows.begins.dtype == torch.int32
    assert rows.visible_RSK.int().tolist() == [[[1, 1, 1, 1, 1]], [[1, 1, 1, 0, 0]]]
