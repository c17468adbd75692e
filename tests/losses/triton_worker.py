"""Runs the Triton kernels under Triton's interpreter and writes what it measured: the interpreter is per process.

Run as a program with a file of runs and a file for the results, both JSON. A run is a text: what is measured, and the
words that the function of that name takes.

Axes: T tokens, V vocabulary columns, H hidden.
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megatron_paint.losses import InterpolationLossConfig, WholeVocab, fused_interpolation_loss, token_logprobs
from megatron_paint.losses.elementwise import triton_backend as triton_passes
from megatron_paint.losses.elementwise.divergences import finish
from megatron_paint.losses.elementwise.interface import ChunkLogits, Target, split_statistics
from megatron_paint.losses.elementwise.softmax_statistics import Softmax, query_tokens
from megatron_paint.losses.elementwise.support import outside_mass, support_floor
from megatron_paint.losses.elementwise.token import TokenLogits, TorchTokenPasses
from megatron_paint.losses.elementwise.torch_backend import TorchPasses
from tests.losses import losses_cases, losses_compare
from tests.losses.losses_cases import CASES, LOGPROB_CASES, TRITON_CASES, make_data, options
from tests.losses.losses_compare import relative
from tests.losses.losses_ranks import axis_of, columns_of

# 48 columns in blocks of 16 or, with padding in the last one, 32.
BLOCKS = (16, 32)
# Rollouts of a case. The interpreter takes as long as there are tokens; a chunk of 6 still cuts the first rollout.
LENGTHS = {"short": (7, 1), "full": losses_cases.LENGTHS}
OPTIONS = options(clip=0.05)


def measure_logprobs(name: str, size: str) -> dict[str, float]:
    """Errors of a case's token log-probabilities against the dense ones, with kernel="triton"."""
    losses_compare.token_logprobs = partial(token_logprobs, kernel="triton")
    triton_passes.TritonTokenPasses.__init__.__kwdefaults__["block"] = BLOCKS[LOGPROB_CASES.index(name) % 2]
    case = CASES[name]
    data, vocab = make_data(case, torch.float32, lengths=LENGTHS[size]), WholeVocab(valid_size=case.valid_size)
    return losses_compare.measure_logprobs(case, data, vocab, slice(None))


def measure_token_kernels(logits: str, gradient: str, columns: str) -> dict[str, float]:
    """Token statistics and gradient of Triton's passes against torch's in float64, one token on another rank."""
    width = int(columns)
    generator = torch.Generator().manual_seed(width)
    values_TV = (torch.randn(4, width, generator=generator) * 3.0).to(getattr(torch, logits))
    ids_T = torch.tensor([0, 2, 3, 5]) % width + torch.tensor([0, 0, width, 0])
    query = query_tokens(ids_T, start=0, columns=width, ratio=1.0)
    results = []
    for exact in (True, False):
        dtype = torch.float64 if exact else values_TV.dtype
        passes = TorchTokenPasses(elements=7)
        if not exact:
            passes = triton_passes.TritonTokenPasses(dlogits_dtype=getattr(torch, gradient), block=16)
        part = TokenLogits(values_TV=values_TV.to(dtype, copy=True))
        packed_TK = passes.statistics(part, query)
        # As if another rank's columns held as much again.
        total = Softmax(packed_TK[:, 0], packed_TK[:, 1] * 2.0)
        scale_T = torch.linspace(-0.5, 2.0, 4, dtype=packed_TK.dtype)
        results.append((packed_TK, passes.gradient(part, query, total, scale_T)))
    (statistics, dlogits_TV), (found, change_TV) = results
    return {"statistics": relative(found, statistics), "gradient": relative(change_TV, dlogits_TV)}


def measure_broken(kernel: str, value: str, which: str) -> dict[str, list[bool]]:
    """Which rows' losses are finite where one hidden state of row 1 is not: of each of `OPTIONS`, or of one of them."""
    found = {}
    names = {"each": list(OPTIONS)}.get(which, [which])
    for side in ("student", "teacher", "full"):
        generator = torch.Generator().manual_seed(3)
        hidden = {key: torch.randn(4, 6, generator=generator) for key in ("student", "teacher", "full")}
        weight_VH = torch.randn(40, 6, generator=generator)
        hidden[side][1, 3] = float(value)
        for name in names:
            output = fused_interpolation_loss(
                hidden["student"],
                weight_VH,
                hidden["teacher"],
                full_teacher_hidden_TH=hidden["full"],
                lengths=[4],
                config=InterpolationLossConfig(**OPTIONS[name], partner="full_teacher", positions="all"),
                vocab=WholeVocab(),
                kernel=kernel,
            )
            found[f"{side} {name}"] = torch.isfinite(output.loss_T).tolist()
        if side == "student":
            scored = token_logprobs(hidden[side], weight_VH, torch.arange(4), vocab=WholeVocab(), kernel=kernel)
            found["logprobs"] = torch.isfinite(scored.logp_T).tolist()
    return found


def measure_sharded(runs: list[str], folder: Path) -> dict[str, float]:
    """The largest error of the fused loss and of token log-probabilities over two ranks' columns, run by run."""
    if not runs:
        return {}
    mp.start_processes(_rank, (2, runs, str(folder)), nprocs=2, start_method="fork")
    parts = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]
    return {key: max(part[key] for part in parts) for key in parts[0]}


def _rank(rank: int, ranks: int, runs: list[str], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    losses_compare.fused_interpolation_loss = partial(fused_interpolation_loss, kernel="triton")
    losses_compare.token_logprobs = partial(token_logprobs, kernel="triton")
    triton_passes.TritonPasses.__init__.__kwdefaults__["block"] = 16
    triton_passes.TritonTokenPasses.__init__.__kwdefaults__["block"] = 16
    found = {}
    for run in runs:
        _, name, size = run.split()
        losses_compare.make_data = partial(make_data, lengths=LENGTHS[size])
        case = CASES[name]
        columns = columns_of(case, rank, ranks)
        errors = losses_compare.measure_case(case, torch.float32, axis_of(case, rank, ranks), columns)
        found[run] = max(value for key, value in errors.items() if not key.startswith("reference"))
    Path(folder, f"rank{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def measure_loss(name: str, size: str) -> dict[str, float]:
    """The fused loss's errors in a case against the dense one, with kernel="triton"."""
    losses_compare.fused_interpolation_loss = partial(fused_interpolation_loss, kernel="triton")
    losses_compare.make_data = partial(make_data, lengths=LENGTHS[size])
    triton_passes.TritonPasses.__init__.__kwdefaults__["block"] = BLOCKS[TRITON_CASES.index(name) % 2]
    case = CASES[name]
    errors = losses_compare.measure_case(case, torch.float32, WholeVocab(valid_size=case.valid_size), slice(None))
    return {key: value for key, value in errors.items() if key.startswith("fused")}


def make_logits(kind: str, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Student's and teacher's logits [4, V] of one kind."""
    generator = torch.Generator().manual_seed(columns)
    student_TV = torch.randn(4, columns, generator=generator) * 3.0
    teacher_TV = student_TV + torch.randn(4, columns, generator=generator) * 0.5
    if kind == "masked" and columns > 2:
        student_TV[:, 1::3] = teacher_TV[:, 1::3] = -torch.inf
    if kind == "extreme":
        student_TV, teacher_TV = ((torch.rand(2, 4, columns, generator=generator) - 0.5) * 2e4).unbind(0)
    if kind == "identical":
        teacher_TV = student_TV.clone()
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(kind, torch.float32)
    return student_TV.to(dtype), teacher_TV.to(dtype)


def measure_kernels(kind: str, divergence: str, columns: str) -> dict[str, float]:
    """Statistics, sums and gradient of Triton's passes against torch's in float64 on the same logits."""
    supports = kind == "support"
    more = {"support": "initial", "support_ratio": 0.1} if supports else {}
    config = InterpolationLossConfig(**OPTIONS[divergence], weight=0.3, **more)
    width = int(columns)
    student_TV, teacher_TV = make_logits(kind, width)
    weight_T = torch.tensor([0.0, 0.3, 0.3, 0.0], dtype=torch.float64)
    half = kind == "bfloat16"
    results = []
    for exact in (False, True):
        dtype = torch.float64 if exact else student_TV.dtype
        parts = [values_TV.to(dtype, copy=True) for values_TV in (student_TV, teacher_TV, teacher_TV.roll(1, 0))]
        if exact:
            passes = TorchPasses(config, elements=7)
            parts = [(part_TV / config.temperature).clamp(min=-1e30) for part_TV in parts]
        else:
            made = torch.bfloat16 if half else torch.float32
            passes = triton_passes.TritonPasses(config, dlogits_dtype=made, block=16)
        deciding_TV = parts[2] if supports else None
        logits = ChunkLogits(student_TV=parts[0], teacher_TV=parts[1], partner_TV=None, deciding_TV=deciding_TV)
        if supports:
            highest_T = parts[2].amax(1) / (1.0 if exact else config.temperature)
            logits.floor_T = support_floor(highest_T, config.support_ratio)
        query = query_tokens(torch.tensor([0, 2, 3, 5]) % width, start=0, columns=width, ratio=0.7)
        found = split_statistics(passes.statistics(logits, query), support=supports, mixed=True, token=True)
        plain = found.support if supports else found.teacher
        student, teacher = (Softmax(part[:, 0], part[:, 1]) for part in (found.student, plain))
        mixed = Softmax(found.mixed[:, 0], found.mixed[:, 1])
        chosen = weight_T > 0
        target = Softmax(*(torch.where(chosen, a, b) for a, b in zip(mixed, teacher, strict=True)))
        scale_T = torch.linspace(0.5, 2.0, 4, dtype=torch.float64 if exact else torch.float32)
        work = passes.sums(logits, Target(student, target, weight_T.to(scale_T.dtype)), scale_T)
        outcome = finish(work.sums_TK, config)
        dlogits_TV = passes.gradient(work, outcome.coefficient_T, scale_T)
        lse = [total.max_T + total.sum_T.log() for total in (student, teacher, target)]
        entropy_T = student.sum_T.log() - found.student[:, 2] / student.sum_T
        sizes_T = [found.support[:, 2]] if supports else []
        measured = [*outcome[:2]]
        if supports:
            whole, uncut = (Softmax(part[:, 0], part[:, 1]) for part in (found.teacher, found.uncut))
            measured += [outside_mass(teacher, whole), outside_mass(mixed, uncut)]
        measured = torch.stack(measured)
        results.append((torch.stack([*lse, entropy_T, *sizes_T]), found.token, measured, dlogits_TV))
    (lse, token, outcome, dlogits_TV), wanted = results
    tensors = (lse, token, outcome, dlogits_TV.float())
    names = ("normalisers", "token", "outcome", "gradient")
    finite = all(bool(torch.isfinite(part).all()) for part in tensors)
    errors = {name: relative(got, want) for name, got, want in zip(names, tensors, wanted, strict=True)}
    return errors | {
        "finite": float(finite),
        "largest": float(dlogits_TV.abs().max()),
        "loss": float(outcome.abs().max()),
    }


MEASURES = {
    "loss": measure_loss,
    "logprobs": measure_logprobs,
    "kernels": measure_kernels,
    "tokens": measure_token_kernels,
    "broken": measure_broken,
}


def main() -> None:
    torch.set_num_threads(1)
    runs, results = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    # First, because a process that has computed gradients cannot always be forked.
    found = measure_sharded([run for run in runs if run.startswith("sharded ")], results.parent)
    for run in runs:
        if run not in found:
            kind, *words = run.split()
            found[run] = MEASURES[kind](*words)
    results.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
