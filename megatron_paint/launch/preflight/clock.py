"""How far the nodes' clocks are apart, asked over the rendezvous and corrected for the time that the question takes."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megatron_paint.launch.preflight.result import Finding
from megatron_paint.launch.preflight.store import Meeting

CHECK = "clock"
LIMIT = 1.0  # seconds
ROUNDS = 3  # the quickest counts
SERVE_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class Offset:
    """By how many seconds a clock is ahead of the first node's, give or take half of a round trip."""

    seconds: float
    round_trip: float


def ask(meeting: Meeting, rank: int, clock: Callable[[], float], deadline: float) -> Offset:
    """On another node: the offset of its clock."""
    offsets = []
    for number in range(ROUNDS):
        began, sent = time.monotonic(), clock()
        place = meeting.count("clock/asked")
        meeting.post(f"clock/ask/{place}", f"{rank}/{number}")
        reply = float(meeting.wait_for(f"clock/reply/{rank}/{number}", deadline, pause=0.002))
        trip = time.monotonic() - began
        offsets.append(Offset(seconds=sent + trip / 2 - reply, round_trip=trip))
    return min(offsets, key=lambda offset: offset.round_trip)


def serve(meeting: Meeting, others: int, clock: Callable[[], float], deadline: float) -> None:
    """On the first node: answers the others' questions in the order in which they come."""
    deadline = min(deadline, time.monotonic() + SERVE_SECONDS)
    for place in range(1, others * ROUNDS + 1):
        asked = meeting.wait_for(f"clock/ask/{place}", deadline, pause=0.001, default="")
        if not asked:  # a node has gone; that it has is noticed where its findings are missing
            return
        meeting.post(f"clock/reply/{asked}", repr(clock()))


def judge(offsets: Mapping[str, Offset]) -> list[Finding]:
    """A finding for each node. offsets: by node, the first node's own, 0, among them.

    The reference is the median, so that a wrong clock of the first node is not laid to the others; of two nodes it is
    the first.
    """
    names = list(offsets)
    values = sorted(offset.seconds for offset in offsets.values())
    middle = statistics.median_low(values) if len(values) > 2 else offsets[names[0]].seconds
    findings = []
    for name, offset in offsets.items():
        off = offset.seconds - middle
        bad = abs(off) - offset.round_trip / 2 > LIMIT
        way = "behind" if off < 0 else "ahead of"
        seen = f"{abs(off):.1f} s {way} the other nodes, give or take {offset.round_trip / 2:.1g} s"
        advice = f"set it by NTP or chrony: {LIMIT:.0f} s is the limit" if bad else ""
        findings.append(Finding(check=CHECK, ok=not bad, seen=seen, advice=advice, node=name))
    return findings
