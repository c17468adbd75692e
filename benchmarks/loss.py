"""Time and memory of the fused interpolation loss against whole logits in autograd and bare matrix products.

    python benchmarks/loss.py                          # one process
    python benchmarks/loss.py --tp 2 --hidden 512      # a vocabulary over two processes
    python benchmarks/loss.py --device cuda --dtype bfloat16 --tokens 8192 --hidden 4096 --chunk-bytes 1e9

Each variant runs in processes of its own, so that peaks of memory do not mix:
    gemms    the matrix products that any implementation needs, over the same chunks: student, teacher, dh and (unless
             --frozen) dW
    whole    plain forward KL from whole logits in autograd with exact vocabulary-parallel sums; no entropies, selection
             or interpolation, so it does less than the others
    fused    fused_interpolation_loss with its default settings
    short    the same with chunks half as long as a rollout, for a selection that needs no statistics
    cut      the same chunks, selecting by entropy: what cutting rollouts costs (selected rows are done twice)
    twice    what cutting would cost with a pass for the statistics before the pass for the gradient
Memory is the peak beyond inputs, dh and dW. CPU seconds, of all threads, bear a busy machine better than seconds do;
the ratios are theirs on a CPU. Axes: T tokens, V vocabulary columns of a rank, H hidden.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megatron_paint.losses import InterpolationLossConfig, ShardedVocab, VocabAxis, WholeVocab, fused_interpolation_loss
from megatron_paint.losses.gemm import OutputLayerGradient, Projection

VARIANTS = ("gemms", "whole", "fused", "short", "cut", "twice")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One benchmark: sizes of the whole problem, and how it runs."""

    tokens: int
    vocab: int
    hidden: int
    rollout: int
    tp: int
    dtype: str
    device: str
    chunk_bytes: float
    frozen: bool
    repeats: int
    clip: float | None


def main() -> None:
    """Run every variant and print a table."""
    args = _arguments()
    chosen = args.variants.split(",")
    job = Job(**{key: value for key, value in vars(args).items() if key != "variants"})
    print(f"torch {torch.__version__}, {job}")
    found = {variant: _measure(job, variant) for variant in chosen}
    basis = "cpu_s" if job.device == "cpu" else "wall_s"
    print(
        f"{'variant':8s} {'wall s':>8s} {'cpu s':>8s} {'/ gemms':>8s} {'/ whole':>8s} {'peak GB':>8s} {'/ whole':>8s}"
    )
    for variant, row in found.items():
        times = [_ratio(row[basis], found.get(base, {}).get(basis)) for base in ("gemms", "whole")]
        memory = _ratio(row["peak"], found.get("whole", {}).get("peak"))
        print(
            f"{variant:8s} {row['wall_s']:8.3f} {row['cpu_s']:8.3f} {times[0]:>8s} {times[1]:>8s} "
            f"{row['peak'] / 1e9:8.3f} {memory:>8s}"
        )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512, help="response tokens of the call")
    parser.add_argument("--vocab", type=int, default=151_936, help="entries of the whole vocabulary")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--rollout", type=int, default=128, help="tokens of a rollout")
    parser.add_argument("--tp", type=int, default=1, help="processes that share the vocabulary")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float64"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--chunk-bytes", type=float, default=1e9)
    parser.add_argument("--clip", type=float, default=None)
    parser.add_argument("--frozen", action="store_true", help="no gradient for the output weight, as with LoRA")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--variants", default=",".join(VARIANTS))
    return parser.parse_args()


def _ratio(value: float, base: float | None) -> str:
    return f"{value / base:.2f}" if base else "-"


def _measure(job: Job, variant: str) -> dict[str, float]:
    """Median seconds and peak bytes, each of the rank that needs most."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (job, variant, folder), nprocs=job.tp)
        ranks = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(job.tp)]
    return {key: max(found[key] for found in ranks) for key in ranks[0]}


def _rank(rank: int, job: Job, variant: str, folder: str) -> None:
    vocab: VocabAxis = WholeVocab()
    if job.device == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // job.tp))
    else:
        torch.cuda.set_device(rank)
    if job.tp > 1:
        backend = "gloo" if job.device == "cpu" else "nccl"
        dist.init_process_group(backend, init_method=f"file://{folder}/meet", rank=rank, world_size=job.tp)
        vocab = ShardedVocab.from_columns(dist.group.WORLD, job.vocab // job.tp)
    data = _inputs(job, rank)
    # A short call first: libraries load and allocate on first use.
    _run(job, variant, vocab, _head_of(data, min(job.tokens, 8)))
    wall_s, cpu_s, peaks = [], [], []
    for _ in range(job.repeats):
        data.student_TH.grad = data.weight_VH.grad = None
        start_bytes = _reset_peak(job)
        start, start_cpu = time.perf_counter(), time.process_time()
        _run(job, variant, vocab, data)
        if job.device == "cuda":
            torch.cuda.synchronize()
        wall_s.append(time.perf_counter() - start)
        cpu_s.append(time.process_time() - start_cpu)
        gradients = sum(g.numel() * 4 for g in (data.student_TH, data.weight_VH) if g.requires_grad)
        peaks.append(_peak(job) - start_bytes - gradients)
    found = {"wall_s": statistics.median(wall_s), "cpu_s": statistics.median(cpu_s), "peak": max(peaks)}
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    if job.tp > 1:
        dist.destroy_process_group()


def _inputs(job: Job, rank: int) -> SimpleNamespace:
    dtype, columns = getattr(torch, job.dtype), job.vocab // job.tp
    generator = torch.Generator(device=job.device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=job.device)

    student_TH = normal(job.tokens, job.hidden)
    teacher_TH = student_TH + 0.1 * normal(job.tokens, job.hidden)
    generator.manual_seed(1 + rank)
    weight_VH = normal(columns, job.hidden) * (3.0 / job.hidden**0.5)
    return SimpleNamespace(
        student_TH=student_TH.to(dtype).requires_grad_(),
        teacher_TH=teacher_TH.to(dtype),
        weight_VH=weight_VH.to(dtype).requires_grad_(not job.frozen),
    )


def _head_of(data: SimpleNamespace, tokens: int) -> SimpleNamespace:
    return SimpleNamespace(
        student_TH=data.student_TH.detach()[:tokens].requires_grad_(),
        teacher_TH=data.teacher_TH[:tokens],
        weight_VH=data.weight_VH.detach().requires_grad_(data.weight_VH.requires_grad),
    )


def _lengths(job: Job, tokens: int) -> list[int]:
    full, rest = divmod(tokens, job.rollout)
    return [job.rollout] * full + [rest] * (rest > 0)


def _run(job: Job, variant: str, vocab: VocabAxis, data: SimpleNamespace) -> None:
    lengths, half = _lengths(job, len(data.student_TH)), max(1, job.rollout // 2)
    if variant == "gemms":
        _bare_products(job, data)
    elif variant == "whole":
        _whole_logits(data, vocab)
    elif variant == "fused":
        _fused(job, data, vocab, lengths, chunk_bytes=job.chunk_bytes)
    elif variant == "cut":
        _fused(job, data, vocab, lengths, chunk_tokens=half)
    elif variant in ("short", "twice"):
        if variant == "twice":
            with torch.no_grad():
                _fused(job, data, vocab, lengths, chunk_tokens=half, backward=False, positions="random")
        _fused(job, data, vocab, lengths, chunk_tokens=half, positions="random")
    else:
        raise SystemExit(f"--variants: got {variant}; choose from {', '.join(VARIANTS)}")


def _fused(job: Job, data, vocab, lengths, *, backward: bool = True, positions: str = "top_fraction", **chunks) -> None:
    output = fused_interpolation_loss(
        data.student_TH,
        data.weight_VH,
        data.teacher_TH,
        lengths=lengths,
        config=InterpolationLossConfig(clip=job.clip, positions=positions),
        vocab=vocab,
        rollout_keys=range(len(lengths)),
        **chunks,
    )
    if backward:
        output.loss_T.sum().backward()


def _bare_products(job: Job, data: SimpleNamespace) -> None:
    """Chunks of as many rows as two float32 buffers of logits leave room for in chunk_bytes."""
    weight_VH = data.weight_VH.detach()
    dtype = torch.float64 if job.dtype == "float64" else torch.float32
    wants = (True, not job.frozen)
    gradient = OutputLayerGradient(data.student_TH, weight_VH, columns=len(weight_VH), dtype=dtype, wants=wants)
    rows_at_once = max(1, int(job.chunk_bytes) // (2 * dtype.itemsize * len(weight_VH)))
    project = Projection(weight_VH, dtype, most_rows=min(rows_at_once, len(data.student_TH)))
    for start in range(0, len(data.student_TH), rows_at_once):
        rows = slice(start, min(start + rows_at_once, len(data.student_TH)))
        project(data.teacher_TH[rows])
        gradient.put(rows, project(data.student_TH.detach()[rows]))


def _whole_logits(data: SimpleNamespace, vocab: VocabAxis) -> None:
    """Forward KL to the plain teacher; each log-softmax takes one maximum and one differentiable sum over ranks."""

    def log_softmax(logits_TV: torch.Tensor) -> torch.Tensor:
        if vocab.ranks == 1:
            return torch.log_softmax(logits_TV, 1)
        logits_TV = logits_TV - vocab.max_shards(logits_TV.amax(1))[:, None]
        return logits_TV - vocab.to_shards(vocab.sum_shards(logits_TV.exp().sum(1)).log())[:, None]

    with torch.no_grad():
        target_logp_TV = log_softmax((data.teacher_TH @ data.weight_VH.T).float() / 1.1)
    hidden_TH = data.student_TH if vocab.ranks == 1 else vocab.to_shards(data.student_TH)
    logp_TV = log_softmax((hidden_TH @ data.weight_VH.T).float() / 1.1)
    vocab.sum_shards((target_logp_TV.exp() * (target_logp_TV - logp_TV)).sum(1)).sum().backward()


def _reset_peak(job: Job) -> int:
    if job.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _peak(job: Job) -> int:
    if job.device == "cuda":
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    main()
