"""A timed all-reduce with a known result: among the GPUs of a node, and over all nodes.

It runs one process per GPU, or one per node without GPUs, as training does. Each is a timed process, so that a process
that hangs is ended.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from megatron_paint.launch.preflight.timed_process import ReportProgress, TimedProcess

if TYPE_CHECKING:
    import torch

CPU_BYTES, GPU_BYTES = 4 << 20, 256 << 20
ROUNDS = 3  # the fastest round counts; the first round opens the connections
PERIOD = 7  # values repeat with this period; it is small enough that every sum is exact in float32


@dataclass(frozen=True, kw_only=True)
class Group:
    """The processes that take part in a sum: this node has `local` of `size`, and the first one has rank `first`."""

    name: str
    host: str  # of the store through which they connect
    port: int
    first: int
    local: int
    size: int
    on_gpu: bool


@dataclass(frozen=True, kw_only=True)
class SumResult:
    """The result of a sum on one node."""

    problem: str = ""  # why there is no sum
    kind: str = "done"  # how its worst process ended
    progress: int = 0  # of its slowest process; 1: group formed, 2: own part ready, 3: all parts gathered, 4..: rounds
    wrong_sum: bool = False
    wrong_ranks: tuple[int, ...] = ()  # processes whose own part arrived wrong
    bandwidth: float = 0.0  # GB/s

    def plain(self) -> dict[str, Any]:
        """The form in which it is sent between nodes."""
        return asdict(self)


def own_part(rank: int) -> float:
    """The value that a process adds; it is multiplied by 1 to 7 over the elements."""
    return rank + 1.0


def run_sum(group: Group, deadline: float, contribution: Callable[[int], float]) -> SumResult:
    """Runs this node's processes until `deadline` (time.monotonic)."""
    seconds = max(1.0, deadline - time.monotonic())
    processes = [
        TimedProcess(lambda report, local=local: _add_up(group, local, contribution, seconds, report))
        for local in range(group.local)
    ]
    results = []
    for process in processes:
        outcome = process.outcome(deadline)
        progress = int(outcome.reached or 0)
        if outcome.problem:
            results.append(SumResult(problem=outcome.problem, kind=outcome.kind, progress=progress))
        else:
            results.append(replace(outcome.value, progress=progress))
    return _worst(results)


def _worst(results: list[SumResult]) -> SumResult:
    order = ("done", "error", "stalled", "killed")
    worst = max(results, key=lambda result: order.index(result.kind))
    return replace(
        worst,
        progress=min(result.progress for result in results),
        wrong_sum=any(result.wrong_sum for result in results),
        wrong_ranks=tuple(sorted({rank for result in results for rank in result.wrong_ranks})),
        bandwidth=min(result.bandwidth for result in results),
    )


def _add_up(
    group: Group, local: int, contribution: Callable[[int], float], seconds: float, report: ReportProgress
) -> SumResult:
    """The work of one process, inside a timed process."""
    import torch
    import torch.distributed as dist

    rank = group.first + local
    device = torch.device("cuda", local) if group.on_gpu else torch.device("cpu")
    timeout = timedelta(seconds=seconds)
    if group.on_gpu:
        torch.cuda.set_device(device)
    store = dist.PrefixStore(
        group.name, dist.TCPStore(group.host, group.port, is_master=False, wait_for_workers=False, timeout=timeout)
    )
    backend = "nccl" if group.on_gpu else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=group.size, timeout=timeout)
    report("1")
    pattern = (torch.arange((GPU_BYTES if group.on_gpu else CPU_BYTES) // 4, device=device) % PERIOD + 1).float()
    part, parts = torch.empty(1, device=device), [torch.empty(1, device=device) for _ in range(group.size)]
    part.fill_(contribution(rank))
    report("2")
    dist.all_gather(parts, part)
    report("3")
    values = [float(each) for each in parts]
    best, wrong = float("inf"), False
    for number in range(ROUNDS):
        total = pattern * part
        best = min(best, _timed_sum(total, device))
        wrong = wrong or not torch.equal(total, pattern * sum(own_part(each) for each in range(group.size)))
        report(str(number + 4))
    return SumResult(
        wrong_sum=wrong,
        wrong_ranks=tuple(each for each, value in enumerate(values) if value != own_part(each)),
        bandwidth=bus_bandwidth(total.numel() * 4, group.size, best),
    )


def _timed_sum(total: "torch.Tensor", device: "torch.device") -> float:
    import torch
    import torch.distributed as dist

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    dist.all_reduce(total)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def bus_bandwidth(count: int, size: int, seconds: float) -> float:
    """GB/s of an all-reduce of `count` bytes over `size` processes, per link, as nccl-tests computes it."""
    return 2 * (size - 1) / size * count / seconds / 1e9
