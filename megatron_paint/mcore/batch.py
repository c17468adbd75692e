"""From sequences to micro-batches: which replica computes which sequence, which run together, as packed tensors.

Axes: T tokens of a micro-batch, N response tokens of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_paint.config.settings import MegatronSettings
from megatron_paint.mcore.attention import TokenRows, token_rows
from megatron_paint.policy import ScoredSequence

# The number of tokens in each rank's shard must be a multiple of this (Transformer Engine's FP8 GEMMs).
FP8_MULTIPLE = {"delayed": 16, "tensorwise": 16, "blockwise": 128, "mxfp8": 32}


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Packed sequences on the device; the hidden states at the positions `predicting_N` predict the response tokens."""

    number: int  # in its replica's pass
    indices: tuple[int, ...]  # of the sequences in the pass, in the order of the rows
    ids_T: Tensor
    rows: TokenRows
    lengths: tuple[int, ...]  # response tokens of each sequence
    predicting_N: Tensor
    token_ids_N: Tensor  # the response tokens


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


def cut_micro_batches(sizes: Sequence[int], limit: int, *, multiple: int = 1) -> list[list[int]]:
    """Groups of items, in order of falling size.

    A group has at most `limit` tokens after padding to `multiple`. An item above the limit gets its own group.
    """
    limit = limit // multiple * multiple
    groups: list[list[int]] = []
    filled = 0
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        if not groups or filled + sizes[index] > limit:
            groups.append([])
            filled = 0
        groups[-1].append(index)
        filled += sizes[index]
    return groups


def computed_tokens(
    sequences: Sequence[ScoredSequence], replicas: Sequence[Sequence[int]], *, limit: int, multiple: int
) -> int:
    """The tokens of all micro-batches of all replicas, padding included. Arguments as of `make_micro_batches`."""
    cuts = _cuts(sequences, replicas, limit, multiple)
    most, total = max(map(len, cuts)), 0
    for taken, groups in zip(replicas, cuts, strict=True):
        tokens = [sum(sequences[taken[place]].num_tokens for place in group) for group in groups]
        total += sum(-(-count // multiple) * multiple for count in tokens) + (most - len(groups)) * multiple
    return total


def make_micro_batches(
    sequences: Sequence[ScoredSequence],
    replicas: Sequence[Sequence[int]],
    *,
    replica: int,
    limit: int,
    multiple: int,
    device: torch.device,
) -> list[MicroBatch]:
    """The micro-batches of one replica. All replicas get the same number of them.

    A replica that needs fewer gets empty ones at the end. An empty micro-batch is one row of padding without a
    response, so its loss is an empty sum. replicas: for each replica, the indices of its sequences. limit: most tokens
    of a micro-batch; a longer sequence is a micro-batch alone. multiple: the tokens are padded to a multiple of it.
    """
    cuts = _cuts(sequences, replicas, limit, multiple)
    groups = [tuple(replicas[replica][place] for place in group) for group in cuts[replica]]
    groups += [()] * (max(map(len, cuts)) - len(groups))
    return [
        _pack([sequences[i] for i in group], number=number, indices=group, multiple=multiple, device=device)
        for number, group in enumerate(groups)
    ]


def _cuts(
    sequences: Sequence[ScoredSequence], replicas: Sequence[Sequence[int]], limit: int, multiple: int
) -> list[list[list[int]]]:
    """For each replica, its micro-batches as places in its list of sequences."""
    return [cut_micro_batches([sequences[i].num_tokens for i in taken], limit, multiple=multiple) for taken in replicas]


def _pack(
    sequences: Sequence[ScoredSequence],
    *,
    number: int,
    indices: tuple[int, ...],
    multiple: int,
    device: torch.device,
) -> MicroBatch:
    lengths = [s.num_tokens for s in sequences]
    padding = -sum(lengths) % multiple if lengths else multiple
    ids = [token for s in sequences for token in (*s.prompt_ids, *s.response_ids[:-1])] + [0] * padding
    predicting: list[int] = []
    begin = 0
    for sequence in sequences:
        first = begin + len(sequence.prompt_ids) - 1
        predicting += range(first, first + len(sequence.response_ids))
        begin += sequence.num_tokens
    return MicroBatch(
        number=number,
        indices=indices,
        ids_T=torch.tensor(ids, device=device),
        rows=token_rows(lengths, padding=padding, device=device),
        lengths=tuple(len(s.response_ids) for s in sequences),
        predicting_N=torch.tensor(predicting, dtype=torch.int64, device=device),
        token_ids_N=torch.tensor([t for s in sequences for t in s.response_ids], dtype=torch.int64, device=device),
    )
