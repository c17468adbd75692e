"""Slices of rows and owners of rollouts, against their definition written out."""

import itertools

import pytest
import torch

from megatron_paint.mcore.batch import assign, make_micro_batches
from megatron_paint.mcore.context import ContextGroup, context_slice, response_exchange
from megatron_paint.policy import ScoredSequence

CPU = torch.device("cpu")
LENGTHS = {1: (2, 6, 4), 2: (8, 4, 12), 3: (6, 18), 4: (16, 8, 8, 24)}


def group(rank: int, size: int) -> ContextGroup:
    return ContextGroup(group=None, rank=rank, size=size)


def slices(size: int) -> list:
    return [context_slice(LENGTHS[size], group(rank, size), device=CPU) for rank in range(size)]


def tokens_of(rank: int, size: int) -> list[int]:
    """Of every row: piece `rank`, and the piece that is as far from the row's end."""
    found, begin = [], 0
    for length in LENGTHS[size]:
        piece = length // (2 * size)
        for number in (rank, 2 * size - 1 - rank):
            found += range(begin + number * piece, begin + (number + 1) * piece)
        begin += length
    return found


@pytest.mark.parametrize("size", LENGTHS)
def test_a_rank_has_two_pieces_of_every_row(size):
    for rank, one in enumerate(slices(size)):
        assert one.token_L.tolist() == tokens_of(rank, size)


@pytest.mark.parametrize("size", LENGTHS)
def test_every_token_is_found_among_the_gathered_slices(size):
    found = slices(size)
    gathered = torch.cat([one.token_L for one in found])
    for one in found:
        assert gathered[one.gathered_T].tolist() == list(range(sum(LENGTHS[size])))


@pytest.mark.parametrize("size", LENGTHS)
def test_the_ranks_have_equal_work(size):
    """Scores of causal attention: a query sees the keys up to itself."""
    slot = torch.cat([torch.arange(length) for length in LENGTHS[size]])
    work = [int((slot[one.token_L] + 1).sum()) for one in slices(size)]
    assert len(set(work)) == 1
    assert sum(work) == sum(n * (n + 1) // 2 for n in LENGTHS[size])


@pytest.mark.parametrize("size", LENGTHS)
def test_a_query_sees_its_row_up_to_itself(size):
    row = torch.repeat_interleave(torch.arange(len(LENGTHS[size])), torch.tensor(LENGTHS[size]))
    begins = [0, *itertools.accumulate(LENGTHS[size])]
    for one in slices(size):
        seen = {}
        for piece in one.pieces:
            keys = torch.full((len(begins) - 1, piece.keys), -1)
            keys[piece.row_P, piece.slot_P] = one.gathered_T.argsort()[piece.gathered_P]
            for local, row_of, slot in zip(piece.local_Q, piece.row_Q, piece.slot_Q, strict=True):
                visible = piece.visible_RSK[row_of, slot]
                seen[int(one.token_L[local])] = keys[row_of][visible].tolist()
            shared = piece.mask(2, torch.float32)
            assert shared is piece.mask(2, torch.float32)
            assert torch.equal(shared[:, 0, ::2] == 0, piece.visible_RSK)
        assert seen.keys() == set(one.token_L.tolist())
        for token, keys in seen.items():
            assert keys == list(range(begins[row[token]], token + 1))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_responses_reach_their_owners(size):
    """The exchange, played through without a group: what each rank sends is what the owners expect."""
    total = sum(LENGTHS[size])
    predicting = torch.arange(1, total, 2)
    owner = torch.arange(len(predicting)) // 3 % size
    parts = [
        response_exchange(predicting, owner, one.gathered_T, group(rank, size), device=CPU)
        for rank, one in enumerate(slices(size))
    ]
    sent = []
    for (places, exchange), one in zip(parts, slices(size), strict=True):
        assert places.tolist() == sorted(places.tolist())
        sent.append(one.token_L[places][exchange.order_M].split(exchange.sent))
    for rank, (_, exchange) in enumerate(parts):
        arrived = torch.cat([everyone[rank] for everyone in sent])
        assert [len(everyone[rank]) for everyone in sent] == exchange.received
        assert torch.equal(arrived[exchange.order_N], predicting[owner == rank])


def sequences() -> list[ScoredSequence]:
    lengths = ((5, 7), (3, 1), (9, 12), (2, 4), (6, 9), (4, 30))
    return [ScoredSequence(prompt_ids=(1,) * p, response_ids=tuple(range(10, 10 + r))) for p, r in lengths]


@pytest.mark.parametrize(("size", "multiple"), [(2, 1), (2, 3), (3, 8)])
def test_micro_batches_of_the_ranks(size, multiple):
    """Every sequence has one owner, which has all its tokens; each rank's tokens are a multiple; the limit holds."""
    given = sequences()
    costs = [one.num_tokens for one in given]
    assignment = assign(given, costs, replicas=2, contexts=size)
    assert [len(set(taken)) for taken in assignment.replicas] == [len(taken) for taken in assignment.replicas]
    owned = []
    for replica, rank in itertools.product(range(2), range(size)):
        batches = make_micro_batches(
            given, assignment, replica=replica, limit=48, multiple=multiple, context=group(rank, size), device=CPU
        )
        for batch in batches:
            assert len(batch.ids_L) % multiple == 0
            assert len(batch.ids_L) == len(batch.rows.position_T)
            assert len(batch.ids_L) * size <= 48 or len(batch.rows.lengths) == 1
            expected = [token for index in batch.indices for token in given[index].response_ids]
            assert batch.token_ids_N.tolist() == expected
            assert batch.lengths == tuple(len(given[index].response_ids) for index in batch.indices)
            owned += batch.indices
    assert sorted(owned) == list(range(len(given)))


def test_owners_share_every_micro_batch():
    """Neighbours in length have different owners, so each rank gets as many sequences of a micro-batch, or one less."""
    given = sequences()
    assignment = assign(given, [one.num_tokens for one in given], replicas=1, contexts=2)
    by_length = sorted(range(len(given)), key=lambda i: -given[i].num_tokens)
    assert [assignment.owners[i] for i in by_length] == [0, 1, 1, 0, 0, 1]
