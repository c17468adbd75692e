"""Measures time, memory, traffic and gradient error of the fused interpolation loss, of full logits and of peers.

    python benchmarks/loss.py                         # the suite of this machine's device: CPU or CUDA
    python benchmarks/loss.py --tokens 512 --tp 2     # one size
    python benchmarks/loss.py --plot docs/loss.png --json loss.json

Peers run if they are installed: pip install nvidia-modelopt megatron-core requests datasets transformers liger-kernel,
and ms-swift with --no-deps (only two of its files are used). Each variant runs in separate processes, so that memory
peaks do not mix:
    gemms     the products with the output layer that any implementation needs: student, teacher, dh and, unless
              --frozen, dW
    dense     full logits in autograd with exact vocabulary-parallel sums, as trainers on full logits do
    modelopt  NVIDIA ModelOpt's LogitsKLLoss
    swift     ms-swift's chunked, vocabulary-parallel divergence
    liger     Liger's fused linear JSD (CUDA, one rank)
    fused     fused_interpolation_loss with its default settings, elementwise work in torch
    triton    the same with the Triton kernels (CUDA)
    short     ours with chunks half as long as a rollout, and a selection that needs no statistics
    cut       the same chunks with selection by entropy: the cost of cutting rollouts (selected rows are done twice)
    support, own-support, initial, weighted
              the fused loss with support: initial, support: student, partner: initial, token_weight: divergence
Memory is the peak above inputs, dh and dW in float32. On a CPU the ratios use the CPU seconds of all threads, because a
busy machine changes them less. Traffic is the number of bytes that a rank puts into collectives, without the sum of dh,
which every variant needs. The gradient error is that of dh and dW together, on a small problem, against float64
autograd on the same inputs.
Axes: T tokens, V vocabulary columns of a rank, H hidden.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from loss_report import fill_fits, plot, print_table
from loss_variants import PEERS, TEMPERATURE, Job, prepare, what_is_missing

from megatron_paint.losses import ShardedVocab, VocabAxis, WholeVocab
from megatron_paint.losses.cpu_math import settle_cpu_math

STANDARD = ("gemms", "dense", "modelopt", "swift", "liger", "fused", "triton")
SMALL = {"tokens": 24, "hidden": 64, "vocab": 8192}


def main() -> None:
    """Runs the suite or one size, prints the tables, and writes the requested files."""
    args = _arguments()
    found = []
    print(f"torch {torch.__version__}, {_device_name(args.device)}, {os.cpu_count()} CPU cores")
    for jobs in _suite(args):
        rows = [_measure(job) for job in jobs]
        found += rows
        print_table([*fill_fits(rows, found)])
        if args.json:
            Path(args.json).write_text(json.dumps(found, indent=1))
    if args.plot:
        plot(found, Path(args.plot))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=None, help="response tokens; measures only this size")
    parser.add_argument("--vocab", type=int, default=151_936, help="entries of the full vocabulary")
    parser.add_argument("--hidden", type=int, default=None, help="default: 1,024; on CUDA the suite has 4,096 too")
    parser.add_argument("--rollout", type=int, default=128, help="tokens of a rollout")
    parser.add_argument(
        "--tp", type=int, default=None, help="processes that share the vocabulary; the suite has 1 and 2 on CPU"
    )
    parser.add_argument("--dtype", default=None, choices=("float32", "bfloat16", "float64"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--chunk-bytes", type=float, default=1e9)
    parser.add_argument("--frozen", action="store_true", help="no gradient for the output weight, as with LoRA")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--variants", default=",".join(STANDARD))
    parser.add_argument("--json", default=None, help="file for all figures")
    parser.add_argument("--plot", default=None, help="PNG of time and memory against tokens (needs matplotlib)")
    return parser.parse_args()


def _suite(args: argparse.Namespace) -> list[list[Job]]:
    """Returns the jobs of each table."""
    given = {name: getattr(args, name) for name in ("vocab", "rollout", "device", "chunk_bytes", "frozen", "repeats")}
    base = {"dtype": args.dtype or ("bfloat16" if args.device == "cuda" else "float32"), **given}
    variants, cuda = args.variants.split(","), args.device == "cuda"
    sizes = [args.tokens] if args.tokens else ([512, 2048, 8192] if cuda else [256, 1024, 2048])
    hiddens = [args.hidden] if args.hidden else ([1024, 4096] if cuda and not args.tokens else [1024])
    ranks = [args.tp] if args.tp else ([1] if cuda or args.tokens else [1, 2])
    tables = []
    for tp in ranks:
        for hidden in hiddens:
            shape = {"tp": tp, "hidden": hidden, **base}
            tables += [[Job(variant=v, tokens=tokens, **shape) for v in variants] for tokens in sizes]
            if args.tokens:
                continue
            if cuda:
                for frozen in (False, True):
                    large = [Job(variant="gemms", tokens=8192, **shape | {"frozen": frozen})]
                    for chunk_bytes in (2.5e8, 5e8, 1e9, 2e9, 4e9):
                        more = {"frozen": frozen, "chunk_bytes": chunk_bytes}
                        large += [Job(variant=v, tokens=8192, **shape | more) for v in ("fused", "triton")]
                    tables.append(large)
            else:
                tables.append(
                    [Job(variant=v, tokens=8192, **shape | {"repeats": 1}) for v in variants if v in ("gemms", "fused")]
                )
    return tables


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "CPU"


def _measure(job: Job) -> dict:
    """Returns median seconds, peak bytes, bytes a token and gradient error: the largest of all ranks."""
    row = asdict(job)
    missing = what_is_missing(job.variant, job.device, job.tp)
    if missing is not None:
        return row | {"missing": missing}
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (job, folder), nprocs=job.tp)
        ranks = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(job.tp)]
    return row | {key: max(found[key] for found in ranks) for key in ranks[0]}


def _rank(rank: int, job: Job, folder: str) -> None:
    vocab = _start(rank, job, folder)
    run = prepare(job, vocab)
    error = 0.0 if job.variant == "gemms" else _gradient_error(job, vocab, rank)
    data = _inputs(job, rank)
    # A short call first, because libraries load and allocate on first use.
    run(_head_of(data, min(job.tokens, 8)))
    wall_s, cpu_s, peaks = [], [], []
    with _CountedTraffic(job) as traffic:
        for _ in range(job.repeats):
            data.student_TH.grad = data.weight_VH.grad = None
            start_bytes = _reset_peak(job)
            start, start_cpu = time.perf_counter(), time.process_time()
            run(data)
            if job.device == "cuda":
                torch.cuda.synchronize()
            wall_s.append(time.perf_counter() - start)
            cpu_s.append(time.process_time() - start_cpu)
            gradients = sum(g.numel() * 4 for g in (data.student_TH, data.weight_VH) if g.requires_grad)
            peaks.append(_peak(job) - start_bytes - gradients)
    found = {
        "wall_s": statistics.median(wall_s),
        "cpu_s": statistics.median(cpu_s),
        "peak": max(peaks),
        "bytes_per_token": traffic.sent / job.repeats / job.tokens,
        "collectives": traffic.calls / job.repeats,
        "gradient_error": error,
    }
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    if dist.is_initialized():
        dist.destroy_process_group()


def _start(rank: int, job: Job, folder: str) -> VocabAxis:
    settle_cpu_math()  # for every variant, so that the error is the method's and not MKL's
    if job.device == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // job.tp))
    else:
        torch.cuda.set_device(rank)
    if job.tp > 1 or job.variant in PEERS:
        backend = "gloo" if job.device == "cpu" else "nccl"
        dist.init_process_group(backend, init_method=f"file://{folder}/meet", rank=rank, world_size=job.tp)
    if job.variant in ("modelopt", "swift"):
        from megatron.core import parallel_state

        parallel_state.initialize_model_parallel(tensor_model_parallel_size=job.tp)
    if job.tp == 1:
        return WholeVocab()
    return ShardedVocab.from_columns(dist.group.WORLD, job.vocab // job.tp)


class _CountedTraffic:
    """Counts this rank's collectives and the bytes it puts into them, except the sum of the hidden gradient."""

    NAMES = ("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor")

    def __init__(self, job: Job) -> None:
        self.calls, self.sent, self._ignored_size = 0, 0, job.tokens * job.hidden

    def __enter__(self) -> _CountedTraffic:
        self._originals = {name: getattr(dist, name) for name in self.NAMES}
        for name, original in self._originals.items():
            setattr(dist, name, self._counted(name, original))
        return self

    def _counted(self, name: str, original):
        def call(*args, **kwargs):
            values = args[0] if name == "all_reduce" else args[1]
            if values.numel() != self._ignored_size:
                self.calls, self.sent = self.calls + 1, self.sent + values.numel() * values.element_size()
            return original(*args, **kwargs)

        return call

    def __exit__(self, *_) -> None:
        for name, original in self._originals.items():
            setattr(dist, name, original)


def _inputs(job: Job, rank: int) -> SimpleNamespace:
    dtype, columns = getattr(torch, job.dtype), job.vocab // job.tp
    generator = torch.Generator(device=job.device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=job.device)

    student_TH = normal(job.tokens, job.hidden)
    teacher_TH, initial_TH = (student_TH + 0.1 * normal(job.tokens, job.hidden) for _ in range(2))
    generator.manual_seed(1 + rank)
    weight_VH = normal(columns, job.hidden) * (3.0 / job.hidden**0.5)
    return SimpleNamespace(
        student_TH=student_TH.to(dtype).requires_grad_(),
        teacher_TH=teacher_TH.to(dtype),
        initial_TH=initial_TH.to(dtype),
        weight_VH=weight_VH.to(dtype).requires_grad_(not job.frozen),
    )


def _head_of(data: SimpleNamespace, tokens: int) -> SimpleNamespace:
    return SimpleNamespace(
        student_TH=data.student_TH.detach()[:tokens].requires_grad_(),
        teacher_TH=data.teacher_TH[:tokens],
        initial_TH=data.initial_TH[:tokens],
        weight_VH=data.weight_VH.detach().requires_grad_(data.weight_VH.requires_grad),
    )


def _gradient_error(job: Job, vocab: VocabAxis, rank: int) -> float:
    """Returns the relative error of this rank's gradients of the plain forward KL."""
    small = replace(job, frozen=False, **SMALL)
    data = _inputs(small, rank)
    axis = vocab if job.tp == 1 else ShardedVocab.from_columns(dist.group.WORLD, small.vocab // job.tp)
    prepare(small, axis)(data, plain=True)
    shards = [_inputs(small, other).weight_VH.detach().double() for other in range(job.tp)]
    student_TH = data.student_TH.detach().double().requires_grad_()
    weight_VH = torch.cat(shards).requires_grad_()
    log_q_TV = torch.log_softmax(data.teacher_TH.double() @ weight_VH.detach().T / TEMPERATURE, 1)
    log_p_TV = torch.log_softmax(student_TH @ weight_VH.T / TEMPERATURE, 1)
    (log_q_TV.exp() * (log_q_TV - log_p_TV)).sum().backward()
    wanted = torch.cat((student_TH.grad, weight_VH.grad.chunk(job.tp)[rank]))
    found = torch.cat((data.student_TH.grad, data.weight_VH.grad)).double()
    return float((found - wanted).norm() / wanted.norm())


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
