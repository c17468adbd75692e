"""The clocks of the ranks against that of rank 0."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_paint.mcore.ranks import Ranks

ROUNDS = 10  # messages there and back, of which the fastest counts
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
TIME_NAMESPACE = Path("/proc/self/ns/time")


@dataclass(frozen=True, kw_only=True)
class ClockOffset:
    """How far a rank's `time.perf_counter` is ahead of that of rank 0, in seconds."""

    seconds: float
    error: float  # the offset is wrong by at most this


def clock_offsets(ranks: Ranks) -> dict[int, ClockOffset]:
    """The offsets of all ranks on rank 0, nothing on the others; all ranks call together.

    Ranks on one machine read the same clock, so their offset is exact. For each further machine, rank 0 and one rank of
    it exchange messages: the other clock was read between the sending and the answer, and its offset to the middle of
    the two is wrong by at most half of the time between them.
    """
    clocks: list[str] = [""] * ranks.size
    dist.all_gather_object(clocks, clock_id(), group=ranks.host_group)
    offsets = {clocks[0]: ClockOffset(seconds=0.0, error=0.0)}
    for rank, clock in enumerate(clocks):
        if clock not in offsets:
            offsets[clock] = _measured(ranks, rank)
    return {rank: offsets[clock] for rank, clock in enumerate(clocks)} if ranks.rank == 0 else {}


def clock_id() -> str:
    """The name of the clock that `time.perf_counter` reads: that of a machine since its start, or of a namespace."""
    try:
        return f"{BOOT_ID.read_text().strip()} {os.readlink(TIME_NAMESPACE) if TIME_NAMESPACE.exists() else ''}"
    except OSError:  # unknown, so its offset is measured
        return f"process {os.getpid()} {time.time_ns()}"


def _measured(ranks: Ranks, other: int) -> ClockOffset:
    """The offset of one rank; all ranks call it, and only rank 0 and this one do something."""
    best = ClockOffset(seconds=0.0, error=float("inf"))
    read = torch.zeros(1, dtype=torch.float64)
    for _ in range(ROUNDS if ranks.rank in (0, other) else 0):
        if ranks.rank == 0:
            sent = time.perf_counter()
            dist.send(read, dst=other, group=ranks.host_group)
            dist.recv(read, src=other, group=ranks.host_group)
            answered = time.perf_counter()
            error = (answered - sent) / 2
            if error < best.error:
                best = ClockOffset(seconds=float(read) - (sent + answered) / 2, error=error)
        else:
            dist.recv(read, src=0, group=ranks.host_group)
            read.fill_(time.perf_counter())
            dist.send(read, dst=0, group=ranks.host_group)
    return best
