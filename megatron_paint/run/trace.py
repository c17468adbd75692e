"""A trace of torch's profiler (Chrome's format): which operators take the time of each phase."""

import json
import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

OUTSIDE = "(no operator)"  # Python, waiting, and what torch does not record
NO_PHASE = "other"
MOST_OPERATORS = 12  # kept for each phase
GPU_WORK = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of the trace
EVENTS = '"traceEvents":'
SEPARATORS = re.compile(r"[\s,]*")
CHUNK = 1 << 20  # characters that are read at once


@dataclass(frozen=True, kw_only=True)
class Operator:
    """What all calls of one operator in one phase took together."""

    name: str
    calls: int
    seconds: float  # without the operators that it calls


@dataclass(frozen=True, kw_only=True)
class TraceSummary:
    """The operators of each phase that took most time, the largest first."""

    cpu: dict[str, list[Operator]]  # OUTSIDE is the time of the phase outside of all operators
    gpu: dict[str, list[Operator]]  # kernels and copies, by the phase in which they began; empty without a GPU


@dataclass(slots=True)
class _Call:
    """A call of an operator, or a range, in one thread. Times are in microseconds."""

    start: float
    end: float
    name: str
    is_range: bool
    inside: float = 0.0  # time of the calls directly below it


def summarise(events: Iterable[Mapping[str, Any]], phases: Collection[str]) -> TraceSummary:
    """Adds up a trace. phases: the names of the ranges that are phases; a phase does not contain another one."""
    threads: dict[Any, list[_Call]] = defaultdict(list)
    gpu_work: list[tuple[float, float, str]] = []
    for event in events:
        if event.get("ph") != "X":
            continue
        category, name, start, took = event.get("cat"), event["name"], float(event["ts"]), float(event["dur"])
        if category in GPU_WORK:
            gpu_work.append((start, took, name))
        elif category == "cpu_op" or (category == "user_annotation" and name in phases):
            call = _Call(start, start + took, name, category != "cpu_op")
            threads[event["tid"]].append(call)
    ranges = sorted((c.start, c.end, c.name) for calls in threads.values() for c in calls if c.is_range)
    starts = [start for start, _, _ in ranges]

    def phase_at(time: float) -> str:
        index = bisect_right(starts, time) - 1
        return ranges[index][2] if index >= 0 and time < ranges[index][1] else NO_PHASE

    cpu, gpu = _Sums(), _Sums()
    for calls in threads.values():
        for call in _with_time_inside(calls):
            phase = call.name if call.is_range else phase_at(call.start)
            cpu.add(phase, OUTSIDE if call.is_range else call.name, call.end - call.start - call.inside)
    for start, took, name in gpu_work:
        gpu.add(phase_at(start), name, took)
    return TraceSummary(cpu=cpu.largest(), gpu=gpu.largest())


def _with_time_inside(calls: list[_Call]) -> list[_Call]:
    """The calls of one thread in the order of their start, each with the time of the calls directly below it."""
    calls.sort(key=lambda call: (call.start, -call.end, not call.is_range))
    above: list[_Call] = []
    for call in calls:
        while above and above[-1].end <= call.start:
            above.pop()
        if above:
            above[-1].inside += call.end - call.start
        above.append(call)
    return calls


class _Sums:
    """Calls and microseconds by phase and name."""

    def __init__(self) -> None:
        self._found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(lambda: [0, 0.0]))

    def add(self, phase: str, name: str, took: float) -> None:
        sums = self._found[phase][name]
        sums[0] += 1
        sums[1] += took

    def largest(self) -> dict[str, list[Operator]]:
        found = {}
        for phase, names in self._found.items():
            operators = [
                Operator(name=name, calls=int(calls), seconds=max(0.0, took / 1e6))
                for name, (calls, took) in names.items()
            ]
            found[phase] = sorted(operators, key=lambda one: -one.seconds)[:MOST_OPERATORS]
        return found


class Trace:
    """A trace that is not compressed. Iterating yields its events, in little memory; `header` has what precedes them.

    ValueError: the file is not complete, which may show only after the last event.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header: dict[str, Any] = {}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with open(self.path, encoding="utf-8", errors="replace") as stream:
            text = self._read_header(stream)
            yield from self._events(stream, text)

    def _read_header(self, stream: TextIO) -> str:
        """Returns what was read behind the bracket that opens the events."""
        text = ""
        while chunk := stream.read(CHUNK):
            text += chunk
            begin = text.find(EVENTS)
            if begin >= 0 and (opened := text.find("[", begin)) >= 0:
                self.header = json.loads(text[: opened + 1] + "]}")
                return text[opened + 1 :]
        raise self._cut_short()

    def _events(self, stream: TextIO, text: str) -> Iterator[dict[str, Any]]:
        decoder, at = json.JSONDecoder(), 0
        while True:
            at = SEPARATORS.match(text, at).end()
            if text[at : at + 1] == "]":
                break
            try:
                event, at = decoder.raw_decode(text, at)
            except json.JSONDecodeError:
                if not (chunk := stream.read(CHUNK)):
                    raise self._cut_short() from None
                text, at = text[at:] + chunk, 0
                continue
            yield event
        if not (text[at:] + stream.read()).rstrip().endswith("}"):
            raise self._cut_short()

    def _cut_short(self) -> ValueError:
        return ValueError(f"{self.path} is no complete trace")


def operators_of(tree: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, list[Operator]]:
    """One field of a TraceSummary, from dictionaries that were read from a file."""
    return {phase: [Operator(**one) for one in operators] for phase, operators in tree.items()}
