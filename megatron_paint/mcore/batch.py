"""From sequences to micro-batches: which replica computes which sequence, which run together, as packed tensors.

Axes: T tokens of a micro-batch, L of them on this rank (all, without context parallelism), N response tokens of it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_paint.config.megatron import MegatronSettings
from megatron_paint.mcore.attention import TokenRows, token_rows
from megatron_paint.mcore.context import ContextGroup, ResponseExchange, context_slice, response_exchange
from megatron_paint.policy import ScoredSequence

# The number of tokens in each rank's shard must be a multiple of this (Transformer Engine's FP8 GEMMs).
FP8_MULTIPLE = {"delayed": 16, "tensorwise": 16, "blockwise": 128, "mxfp8": 32}


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """Who computes each sequence of a pass."""

    replicas: list[list[int]]  # the sequences of each data-parallel replica
    owners: list[int]  # of each sequence: the context-parallel rank that gets its response


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Packed sequences on the device. The hidden states at the places `predicting_N` predict the response tokens.

    With context parallelism `indices`, `lengths` and `token_ids_N` are of the sequences that this rank owns, and
    `predicting_N` are the places of response tokens that it has, of any sequence; `exchange` sends their hidden states
    to the owners.
    """

    number: int  # in its replica's pass
    indices: tuple[int, ...]  # of the sequences in the pass, in the order of the rows
    ids_L: Tensor
    rows: TokenRows
    lengths: tuple[int, ...]  # response tokens of each sequence
    predicting_N: Tensor
    token_ids_N: Tensor  # the response tokens
    exchange: ResponseExchange | None = None


def token_multiple(megatron: MegatronSettings) -> int:
    """The number of tokens of a call must be a multiple of this."""
    ranks = megatron.tensor_model_parallel_size if megatron.sequence_parallel else 1
    return ranks * (FP8_MULTIPLE[megatron.fp8_recipe] if megatron.fp8 is not None else 1)


def assign_replicas(costs: Sequence[int], replicas: int) -> list[list[int]]:
    """The indices of each data-parallel replica's items: the largest cost first, to the replica with the lowest sum."""
    loads = [(0, replica) for replica in range(replicas)]
    taken: list[list[int]] = [[] for _ in range(replicas)]
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, replica = min(loads)
        loads[replica] = (load + costs[index], replica)
        taken[replica].append(index)
    return taken


def assign(sequences: Sequence[ScoredSequence], costs: Sequence[int], *, replicas: int, contexts: int) -> Assignment:
    """Deals sequences out to replicas by cost, and each replica's to its context-parallel ranks.

    The sequences of a replica, sorted by falling length, are dealt to its ranks back and forth. So each rank gets about
    the same number of response tokens of every micro-batch.
    """
    assigned = assign_replicas(costs, replicas)
    owners = [0] * len(sequences)
    for taken in assigned:
        for place, index in enumerate(_by_length([sequences[i].num_tokens for i in taken])):
            turn = place % (2 * contexts)
            owners[taken[index]] = min(turn, 2 * contexts - 1 - turn)
    return Assignment(replicas=assigned, owners=owners)


def _by_length(sizes: Sequence[int]) -> list[int]:
    """Indices in order of falling size."""
    return sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))


def cut_micro_batches(sizes: Sequence[int], limit: int, *, multiple: int = 1) -> list[list[int]]:
    """Groups of items, in order of falling size.

    A group has at most `limit` tokens after padding to `multiple`. An item above the limit gets its own group.
    """
    limit = limit // multiple * multiple
    groups: list[list[int]] = []
    filled = 0
    for index in _by_length(sizes):
        if not groups or filled + sizes[index] > limit:
            groups.append([])
            filled = 0
        groups[-1].append(index)
        filled += sizes[index]
    return groups


def computed_tokens(
    sequences: Sequence[ScoredSequence],
    assignment: Assignment,
    *,
    limit: int,
    multiple: int,
    context: ContextGroup | None,
    in_groups_of: int = 1,
) -> int:
    """The tokens of all micro-batches of all replicas, padding included. Arguments as of `make_micro_batches`."""
    row_multiple, multiple = _multiples(multiple, context)
    tokens = [
        sum(_padded(sequences[i].num_tokens, row_multiple) for i in group)
        for groups in _groups(sequences, assignment, limit, row_multiple, multiple, in_groups_of)
        for group in groups
    ]
    return sum(_padded(count, multiple) or multiple for count in tokens)


def make_micro_batches(
    sequences: Sequence[ScoredSequence],
    assignment: Assignment,
    *,
    replica: int,
    limit: int,
    multiple: int,
    context: ContextGroup | None,
    device: torch.device,
    in_groups_of: int = 1,
) -> list[MicroBatch]:
    """The micro-batches of one replica. All replicas get the same number of them.

    A replica that needs fewer gets empty ones at the end. An empty micro-batch is one row of padding without a
    response, so its loss is an empty sum. limit: most tokens of a micro-batch; a longer sequence is a micro-batch
    alone. multiple: each rank's tokens are padded to a multiple of it. context: None if a replica has one rank for
    all tokens. in_groups_of: the number of micro-batches is a multiple of it.
    """
    row_multiple, multiple = _multiples(multiple, context)
    groups = _groups(sequences, assignment, limit, row_multiple, multiple, in_groups_of)[replica]
    how = {"multiple": multiple, "row_multiple": row_multiple, "device": device}
    packed = [
        _pack([sequences[i] for i in group], number=number, indices=group, **how) for number, group in enumerate(groups)
    ]
    if context is None:
        return packed
    return [_slice(batch, [assignment.owners[i] for i in batch.indices], context) for batch in packed]


def _padded(size: int, multiple: int) -> int:
    return size + -size % multiple


def _multiples(multiple: int, context: ContextGroup | None) -> tuple[int, int]:
    """What the tokens of a row, and those of a call, are padded to."""
    if context is None:
        return 1, multiple
    return context.row_multiple, math.lcm(context.row_multiple, multiple * context.size)


def _groups(
    sequences: Sequence[ScoredSequence],
    assignment: Assignment,
    limit: int,
    row_multiple: int,
    multiple: int,
    in_groups_of: int,
) -> list[list[tuple[int, ...]]]:
    """For each replica, the sequences of its micro-batches; all replicas have the same number of these."""
    sizes = [_padded(sequence.num_tokens, row_multiple) for sequence in sequences]
    groups = [
        [
            tuple(taken[place] for place in group)
            for group in cut_micro_batches([sizes[i] for i in taken], limit, multiple=multiple)
        ]
        for taken in assignment.replicas
    ]
    most = _padded(max(map(len, groups)), in_groups_of)
    return [found + [()] * (most - len(found)) for found in groups]


def _pack(
    sequences: Sequence[ScoredSequence],
    *,
    number: int,
    indices: tuple[int, ...],
    multiple: int,
    row_multiple: int,
    device: torch.device,
) -> MicroBatch:
    """A micro-batch of which this rank has every token. Padding of a row comes after its tokens, which never see it."""
    lengths = [_padded(s.num_tokens, row_multiple) for s in sequences]
    padding = -sum(lengths) % multiple if lengths else multiple
    ids: list[int] = []
    for sequence, length in zip(sequences, lengths, strict=True):
        ids += (*sequence.prompt_ids, *sequence.response_ids[:-1])
        ids += [0] * (length - sequence.num_tokens)
    ids += [0] * padding
    predicting: list[int] = []
    begin = 0
    for sequence, length in zip(sequences, lengths, strict=True):
        first = begin + len(sequence.prompt_ids) - 1
        predicting += range(first, first + len(sequence.response_ids))
        begin += length
    return MicroBatch(
        number=number,
        indices=indices,
        ids_L=torch.tensor(ids, device=device),
        rows=token_rows(lengths, padding=padding, device=device),
        lengths=tuple(len(s.response_ids) for s in sequences),
        predicting_N=torch.tensor(predicting, dtype=torch.int64, device=device),
        token_ids_N=torch.tensor([t for s in sequences for t in s.response_ids], dtype=torch.int64, device=device),
    )


def _slice(batch: MicroBatch, owners: Sequence[int], context: ContextGroup) -> MicroBatch:
    """This context-parallel rank's part of a micro-batch: its tokens of every row, and the sequences that it owns."""
    device, rows = batch.ids_L.device, batch.rows
    mine = context_slice(rows.packed_lengths, context, device=device)
    length_S = torch.tensor(batch.lengths, dtype=torch.int64)
    owner_N = torch.tensor(owners, dtype=torch.int64).repeat_interleave(length_S)
    places, exchange = response_exchange(batch.predicting_N.cpu(), owner_N, mine.gathered_T, context, device=device)
    owned = [place for place, owner in enumerate(owners) if owner == context.rank]
    return replace(
        batch,
        indices=tuple(batch.indices[place] for place in owned),
        ids_L=batch.ids_L[mine.token_L],
        rows=replace(rows, position_T=rows.position_T[mine.token_L], context=mine),
        lengths=tuple(batch.lengths[place] for place in owned),
        predicting_N=places,
        token_ids_N=batch.token_ids_N[(owner_N == context.rank).to(device)],
        exchange=exchange,
    )
