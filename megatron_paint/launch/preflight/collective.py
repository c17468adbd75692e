"""A sum over processes with a known answer, timed: among a node's GPUs, and over all nodes.

One process a GPU, or one a node without any, as in training; each is an errand, so that one which hangs is ended.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from megatron_paint.launch.preflight.timed_process import Errand, Tell

if TYPE_CHECKING:
    import torch

CPU_BYTES, GPU_BYTES = 4 << 20, 256 << 20
ROUNDS = 3  # the quickest counts; the first one makes the connections
PERIOD = 7  # values repeat after so many, small enough that every sum is exact in float32


@dataclass(frozen=True, kw_only=True)
class Group:
    """Who adds up: `local` processes of this node, the first of them of rank `first`, of `size` in all."""

    name: str
    host: str  # of the store at which they meet
    port: int
    first: int
    local: int
    size: int
    on_gpu: bool


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one node has of a collective."""

    problem: str = ""  # why there is no sum
    kind: str = "done"  # how its worst errand ended
    progress: int = 0  # of its slowest process; 1: it has met the others, 2: it has its part, 3: all parts, 4..: rounds
    wrong_sum: bool = False
    wrong_ranks: tuple[int, ...] = ()  # processes whose own part arrived wrong
    bandwidth: float = 0.0  # GB/s

    def plain(self) -> dict[str, Any]:
        """As it is sent between nodes."""
        return asdict(self)


def own_part(rank: int) -> float:
    """What a process adds, times 1 to 7 over the elements."""
    return rank + 1.0


def take_part(group: Group, deadline: float, contribution: Callable[[int], float]) -> Result:
    """Runs this node's processes until `deadline` (time.monotonic)."""
    seconds = max(1.0, deadline - time.monotonic())
    errands = [
        Errand(lambda tell, local=local: _add_up(group, local, contribution, seconds, tell))
        for local in range(group.local)
    ]
    results = []
    for errand in errands:
        outcome = errand.outcome(deadline)
        progress = int(outcome.reached or 0)
        if outcome.problem:
            results.append(Result(problem=outcome.problem, kind=outcome.kind, progress=progress))
        else:
            results.append(replace(outcome.value, progress=progress))
    return _worst(results)


def _worst(results: list[Result]) -> Result:
    order = ("done", "error", "stalled", "killed")
    worst = max(results, key=lambda result: order.index(result.kind))
    return replace(
        worst,
        progress=min(result.progress for result in results),
        wrong_sum=any(result.wrong_sum for result in results),
        wrong_ranks=tuple(sorted({rank for result in results for rank in result.wrong_ranks})),
        bandwidth=min(result.bandwidth for result in results),
    )


def _add_up(group: Group, local: int, contribution: Callable[[int], float], seconds: float, tell: Tell) -> Result:
    """One process's part, in an errand."""
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
    tell("1")
    pattern = (torch.arange((GPU_BYTES if group.on_gpu else CPU_BYTES) // 4, device=device) % PERIOD + 1).float()
    part, parts = torch.empty(1, device=device), [torch.empty(1, device=device) for _ in range(group.size)]
    part.fill_(contribution(rank))
    tell("2")
    dist.all_gather(parts, part)
    tell("3")
    values = [float(each) for each in parts]
    best, wrong = float("inf"), False
    for number in range(ROUNDS):
        total = pattern * part
        best = min(best, _timed_sum(total, device))
        wrong = wrong or not torch.equal(total, pattern * sum(own_part(each) for each in range(group.size)))
        tell(str(number + 4))
    return Result(
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
    """GB/s of an all-reduce of `count` bytes over `size` processes: what each link carried, as nccl-tests counts it."""
    return 2 * (size - 1) / size * count / seconds / 1e9
