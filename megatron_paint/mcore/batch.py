"""From samples to micro-batches: which replica takes which sample, which sequences run together, as packed tensors.

Axes: T tokens of a micro-batch, N response tokens of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_paint.config.settings import MegatronSettings
from megatron_paint.mcore.attention import TokenRows, token_rows
from megatron_paint.records import TokenIds

# Tokens that each rank's shard of a sequence must be a multiple of (Transformer Engine's FP8 GEMMs).
FP8_MULTIPLE = {"delayed": 16, "tensorwise": 16, "blockwise": 128, "mxfp8": 32}


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredSequence:
    """One sequence to score: `response_ids` after `prompt_ids`, of sample `index` of the step."""

    index: int
    prompt_ids: TokenIds
    response_ids: TokenIds

    @property
    def num_tokens(self) -> int:
        """Tokens the network sees: the last response token predicts nothing that is scored."""
        return len(self.prompt_ids) + len(self.response_ids) - 1


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Packed sequences on the device; `predicting_N` are the places in T whose hidden states predict the response."""

    number: int
    indices: tuple[int, ...]  # of the samples, in the order of the rows
    ids_T: Tensor
    rows: TokenRows
    lengths: tuple[int, ...]  # response tokens of each sequence
    predicting_N: Tensor
    token_ids_N: Tensor  # the response tokens


def token_multiple(megatron: MegatronSettings) -> int:
    """What the number of tokens of a call must be a multiple of."""
    ranks = megatron.tensor_model_parallel_size if megatron.sequence_parallel else 1
    return ranks * (FP8_MULTIPLE[megatron.fp8_recipe] if megatron.fp8 is not None else 1)


def assign_replicas(costs: Sequence[int], replicas: int) -> list[list[int]]:
    """Indices of the items that each data-parallel replica takes: longest first, to the one with least so far."""
    loads = [(0, replica) for replica in range(replicas)]
    taken: list[list[int]] = [[] for _ in range(replicas)]
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, replica = min(loads)
        loads[replica] = (load + costs[index], replica)
        taken[replica].append(index)
    return taken


def cut_micro_batches(sizes: Sequence[int], limit: int, *, multiple: int = 1) -> list[list[int]]:
    """Groups of items, by falling size, of at most `limit` tokens each once padded to `multiple`; an item above the
    limit stands alone."""
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


def make_micro_batches(
    sequences: Sequence[ScoredSequence], *, limit: int, multiple: int, count: int, device: torch.device
) -> list[MicroBatch]:
    """This replica's micro-batches; empty ones fill up to `count`, so that every replica runs equally many.

    An empty micro-batch is one row of padding without response: its loss is an empty sum.
    """
    groups = cut_micro_batches([s.num_tokens for s in sequences], limit, multiple=multiple)
    groups += [[] for _ in range(count - len(groups))]
    return [
        _pack([sequences[i] for i in group], number=number, multiple=multiple, device=device)
        for number, group in enumerate(groups)
    ]


def _pack(sequences: Sequence[ScoredSequence], *, number: int, multiple: int, device: torch.device) -> MicroBatch:
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
        indices=tuple(s.index for s in sequences),
        ids_T=torch.tensor(ids, device=device),
        rows=token_rows(lengths, padding=padding, device=device),
        lengths=tuple(len(s.response_ids) for s in sequences),
        predicting_N=torch.tensor(predicting, dtype=torch.int64, device=device),
        token_ids_N=torch.tensor([t for s in sequences for t in s.response_ids], dtype=torch.int64, device=device),
    )
