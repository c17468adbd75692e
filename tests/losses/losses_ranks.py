"""One process group per layout that runs every case of the loss tests and writes what it measured.

Axes: T tokens, V this rank's vocabulary columns, H hidden.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megatron_paint.losses import ShardedVocab, fused_interpolation_loss, interpolation_loss, token_logprobs
from megatron_paint.losses.elementwise.divergences import DIVERGENCES
from tests.losses.losses_cases import CASES, COLUMNS, HIDDEN, Case, make_data, short
from tests.losses.losses_compare import FACTOR, measure_case, relative
from tests.losses.losses_dense import dense_loss

SKEWED_CUTS = {2: (0, 20, 48), 4: (0, 5, 20, 21, 48)}
DTYPES = {"float64": torch.float64, "float32": torch.float32}

# Four processes wait for each other long on two cores: at TP 4 float32 runs where rounding can differ from TP 2.
_FEW = ("cut", "cut-most", "cut-full-teacher", "padded", "skewed")
SHARDED_RUNS = [
    (ranks, dtype, name)
    for ranks in (2, 4)
    for dtype in DTYPES
    for name in CASES
    if (ranks, dtype) != (4, "float32") or name.partition("-")[2] in _FEW
]


def is_long(ranks: int, dtype: str, name: str) -> bool:
    """Whether `make test` leaves this run out: layouts differ in rounding and cuts, and each type runs all at TP 1."""
    return (ranks, dtype) != (2, "float64") and (name.partition("-")[2] not in _FEW or (ranks, dtype) == (4, "float32"))


def measure_layout(ranks: int, runs: Sequence[tuple[str, str]], folder: Path) -> list[dict]:
    """Starts the ranks and returns what each rank measured.

    runs: type and name of the cases. The ranks are forks of a process that has imported everything once.
    """
    mp.get_context("forkserver").set_forkserver_preload([__name__])
    mp.start_processes(_rank, (ranks, runs, str(folder)), nprocs=ranks, start_method="forkserver")
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ranks)]


def _rank(rank: int, ranks: int, runs: Sequence[tuple[str, str]], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks, timeout=timedelta(seconds=600)
    )
    cases = {
        f"{name} {dtype}": measure_case(
            CASES[name], DTYPES[dtype], axis_of(CASES[name], rank, ranks), columns_of(CASES[name], rank, ranks)
        )
        for dtype, name in runs
    }
    found = {
        "cases": cases,
        "spread": _spread_over_ranks(rank, ranks),
        "partial_hidden": _partial_hidden(rank, ranks),
        "plain_all_reduce": _plain_all_reduce(rank, ranks),
        "traffic": {name: _traffic(name, rank, ranks) for name in ("clipped", "jsd-cut", "forward-none")},
        "empty": _empty(rank, ranks),
        "derived_chunks": _derived_chunks(rank, ranks),
    }
    Path(folder, f"rank{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def columns_of(case: Case, rank: int, ranks: int) -> slice:
    if case.skewed:
        return slice(*SKEWED_CUTS[ranks][rank : rank + 2])
    return slice(rank * COLUMNS // ranks, (rank + 1) * COLUMNS // ranks)


def axis_of(case: Case, rank: int, ranks: int, **more) -> ShardedVocab:
    columns = columns_of(case, rank, ranks)
    if case.skewed or more:
        axis = {"start": columns.start, "stop": columns.stop, "size": COLUMNS, "valid_size": case.valid_size}
        return ShardedVocab(dist.group.WORLD, **axis, **more)
    return ShardedVocab.from_columns(dist.group.WORLD, columns.stop - columns.start, valid_size=case.valid_size)


def _fused(case: Case, rank: int, ranks: int, vocab: ShardedVocab, data=None, **more):
    data = make_data(case, torch.float64) if data is None else data
    student_TH = data.student_TH.clone().requires_grad_()
    weight_VH = data.weight_VH[columns_of(case, rank, ranks)].clone().requires_grad_()
    output = fused_interpolation_loss(
        student_TH,
        weight_VH,
        data.teacher_TH,
        lengths=data.lengths,
        config=case.config,
        vocab=vocab,
        **({"chunk_tokens": case.chunk_tokens} | more),
    )
    (output.loss_T.sum() * FACTOR).backward()
    return output, student_TH.grad, weight_VH.grad


def _spread_over_ranks(rank: int, ranks: int) -> float:
    """How far the ranks' losses are apart, in all: what is replicated is so to the bit."""
    case = CASES["clipped-cut"]
    loss_T = _fused(case, rank, ranks, axis_of(case, rank, ranks))[0].loss_T.detach()
    losses = [torch.empty_like(loss_T) for _ in range(ranks)]
    dist.all_gather(losses, loss_T)
    return float(sum((other - losses[0]).abs().sum() for other in losses))


def _partial_hidden(rank: int, ranks: int) -> dict[str, float]:
    """reduce_hidden_grad=False: each rank's part is not the whole, and the parts add up to it."""
    case = CASES["jsd-cut"]
    whole_TH = _fused(case, rank, ranks, axis_of(case, rank, ranks))[1]
    part_TH = _fused(case, rank, ranks, axis_of(case, rank, ranks, reduce_hidden_grad=False))[1]
    total_TH = part_TH.clone()
    dist.all_reduce(total_TH)
    return {"part": relative(part_TH, whole_TH), "total": relative(total_TH, whole_TH)}


class _PlainAllReduce(ShardedVocab):
    """The common mistake: sums over ranks are taken by all_reduce, and the way back to the shards is forgotten."""

    def to_shards(self, values: torch.Tensor) -> torch.Tensor:
        return values


def _plain_all_reduce(rank: int, ranks: int) -> dict[str, dict[str, float]]:
    found = {}
    for name in map(short, DIVERGENCES):
        case = CASES[name]
        data, columns = make_data(case, torch.float64), columns_of(case, rank, ranks)
        student_TV = (data.student_TH @ data.weight_VH.T).requires_grad_()
        teacher_TV = data.teacher_TH @ data.weight_VH.T
        want = dense_loss(student_TV, teacher_TV, lengths=data.lengths, config=case.config)
        want.loss_T.sum().backward()
        local_TV = student_TV.detach()[:, columns].clone().requires_grad_()
        vocab = _PlainAllReduce(dist.group.WORLD, start=columns.start, stop=columns.stop, size=COLUMNS)
        got = interpolation_loss(
            local_TV, teacher_TV[:, columns], lengths=data.lengths, config=case.config, vocab=vocab
        )
        got.loss_T.sum().backward()
        found[name] = {
            "value": relative(got.loss_T, want.loss_T),
            "gradient": relative(local_TV.grad, student_TV.grad[:, columns]),
        }
    return found


def _traffic(name: str, rank: int, ranks: int) -> dict[str, float]:
    """Collectives of a fused float32 call and the bytes that this rank puts into them, hidden gradient apart."""
    case = CASES[name]
    calls, sent = [], []
    all_gather, all_reduce = dist.all_gather, dist.all_reduce

    def counted_gather(outputs, values, **kwargs):
        calls.append("gather")
        sent.append(values.numel() * values.element_size())
        return all_gather(outputs, values, **kwargs)

    def counted_reduce(values, **kwargs):
        calls.append("reduce")
        sent.append(values.numel() * values.element_size())
        return all_reduce(values, **kwargs)

    dist.all_gather, dist.all_reduce = counted_gather, counted_reduce
    try:
        data = make_data(case, torch.float32)
        more = {"chunk_tokens": 6, "token_ids_T": data.ids_T, "token_temperature": 0.9}
        vocab = axis_of(case, rank, ranks, reduce_hidden_grad=False)
        _fused(case, rank, ranks, vocab, data=data, **more)
    finally:
        dist.all_gather, dist.all_reduce = all_gather, all_reduce
    return {"calls": len(calls), "gathers": calls.count("gather"), "bytes_per_token": sum(sent) / sum(data.lengths)}


def _empty(rank: int, ranks: int) -> dict[str, float]:
    """A micro-batch without response tokens: no loss, no gradient, nothing that waits for another rank."""
    case = CASES["clipped"]
    data = make_data(case, torch.float64, lengths=())
    output, dhidden_TH, dweight_VH = _fused(case, rank, ranks, axis_of(case, rank, ranks), data=data)
    hidden_TH = data.student_TH.clone().requires_grad_()
    weight_VH = data.weight_VH[columns_of(case, rank, ranks)]
    logprobs = token_logprobs(hidden_TH, weight_VH, data.ids_T, vocab=axis_of(case, rank, ranks))
    logprobs.logp_T.sum().backward()
    assert dhidden_TH.shape == hidden_TH.grad.shape == (0, HIDDEN)
    return {"loss": float(output.loss_T.detach().sum()), "dweight": float(dweight_VH.abs().sum())}


def _derived_chunks(rank: int, ranks: int) -> float:
    """Shards of unequal width and a padded vocabulary still agree on the chunks that chunk_bytes gives."""
    case = CASES["forward-skewed"]
    vocab = axis_of(case, rank, ranks)
    whole = _fused(case, rank, ranks, vocab, chunk_tokens=None)
    small = _fused(case, rank, ranks, vocab, chunk_tokens=None, chunk_bytes=12 * 48 * 8)
    return max(relative(a, b) for a, b in zip(small[1:], whole[1:], strict=True))
