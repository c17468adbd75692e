"""Measures how far the nodes' clocks differ.

A node asks the first node for its time through the store. The answer is corrected for the time of the question.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megatron_paint.launch.preflight.result import CheckResult
from megatron_paint.launch.preflight.store import NodeStore

CHECK = "clock"
LIMIT = 1.0  # seconds
ROUNDS = 3  # the round with the shortest round trip counts
SERVE_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class Offset:
    """How many seconds a clock is ahead of the first node's clock. The error is at most half a round trip."""

    seconds: float
    round_trip: float


def ask(store: NodeStore, rank: int, clock: Callable[[], float], deadline: float) -> Offset:
    """On another node: measures the offset of its clock."""
    offsets = []
    for number in range(ROUNDS):
        began, sent = time.monotonic(), clock()
        question = store.count("clock/asked")
        store.post(f"clock/ask/{question}", f"{rank}/{number}")
        reply = float(store.wait_for(f"clock/reply/{rank}/{number}", deadline, pause=0.002))
        trip = time.monotonic() - began
        offsets.append(Offset(seconds=sent + trip / 2 - reply, round_trip=trip))
    return min(offsets, key=lambda offset: offset.round_trip)


def serve(store: NodeStore, others: int, clock: Callable[[], float], deadline: float) -> None:
    """On the first node: answers the questions of the other nodes in the order in which they come."""
    deadline = min(deadline, time.monotonic() + SERVE_SECONDS)
    for question in range(1, others * ROUNDS + 1):
        asked = store.wait_for(f"clock/ask/{question}", deadline, pause=0.001, default="")
        if not asked:  # a node is gone; the coordinator notices it because the node's results are missing
            return
        store.post(f"clock/reply/{asked}", repr(clock()))


def compare(offsets: Mapping[str, Offset]) -> list[CheckResult]:
    """A result for each node. offsets: by node, including the first node's own offset, 0.

    The reference is the median. So a wrong clock of the first node is not blamed on the others. With two nodes the
    reference is the first node.
    """
    names = list(offsets)
    values = sorted(offset.seconds for offset in offsets.values())
    middle = statistics.median_low(values) if len(values) > 2 else offsets[names[0]].seconds
    results = []
    for name, offset in offsets.items():
        off = offset.seconds - middle
        bad = abs(off) - offset.round_trip / 2 > LIMIT
        way = "behind" if off < 0 else "ahead of"
        seen = f"{abs(off):.1f} s {way} the other nodes, give or take {offset.round_trip / 2:.1g} s"
        advice = f"set the clock with NTP or chrony: the limit is {LIMIT:.0f} s" if bad else ""
        results.append(CheckResult(check=CHECK, ok=not bad, seen=seen, advice=advice, node=name))
    return results
