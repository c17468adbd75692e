"""The time line of profiled steps, RUN/profile/timeline.json: when each rank was in which phase.

The file is a trace in Chrome's format: one process a rank, one lane a phase. Under the key `steps` it also has the same
times and the largest operators, from which `inspect profile` makes its tables.
"""

import dataclasses
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from types import UnionType
from typing import Any

from megatron_paint.base.errors import UserError
from megatron_paint.base.json_text import to_json
from megatron_paint.config.profile import PHASES
from megatron_paint.run.trace import NO_PHASE, TraceSummary, operators_of
from megatron_paint.runtime.files import write_atomically

STEP = "step"  # the range that contains the phases of the training step itself
LANES = (STEP, *PHASES)
CLOCK = (
    "Times are seconds since 1970 by the clock of rank 0. Ranks on its machine read the same clock. The offset of each "
    "other machine was measured after the step, by messages to rank 0; it is wrong by at most clock_error_s."
)


@dataclass(frozen=True, kw_only=True)
class Span:
    """A phase on one rank. Times are in seconds."""

    phase: str
    start: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class RankTimes:
    """One step on one rank: the time line of its phases, and the largest operators if the rank was traced."""

    step: int
    rank: int
    host: str
    start: float  # of the step, before its first phase
    seconds: float  # with what follows the step: checkpoint, export and evaluation
    spans: tuple[Span, ...]
    clock_error_s: float = 0.0  # largest error of the times against those of rank 0
    operators: TraceSummary | None = None

    def phases(self) -> dict[str, float]:
        """Seconds by phase, in the order of LANES; NO_PHASE is the rest of the step."""
        names = sorted({span.phase for span in self.spans} - {STEP}, key=_order)
        found = {name: sum(span.seconds for span in self.spans if span.phase == name) for name in names}
        return found | {NO_PHASE: max(0.0, self.seconds - sum(found.values()))}

    def moved(self, by: float, *, error: float) -> "RankTimes":
        """The same times by another clock, which is `by` seconds ahead."""
        spans = tuple(dataclasses.replace(span, start=span.start + by) for span in self.spans)
        return dataclasses.replace(self, start=self.start + by, spans=spans, clock_error_s=error)


@dataclass(frozen=True, kw_only=True)
class PhaseRow:
    """One phase of one step over all ranks."""

    step: int
    phase: str
    slowest: float  # seconds
    slowest_rank: int
    fastest: float  # seconds
    fastest_rank: int
    share: float  # of the step, mean over ranks


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """The profiled steps of a run, in order."""

    steps: Mapping[int, Sequence[RankTimes]] = field(default_factory=dict)  # all ranks of each step

    def with_step(self, ranks: Sequence[RankTimes]) -> "Timeline":
        """The time line with one step more, which replaces an earlier one of the same number."""
        steps = {**self.steps, ranks[0].step: tuple(sorted(ranks, key=lambda one: one.rank))}
        return Timeline(steps=dict(sorted(steps.items())))

    def rows(self, step: int) -> list[PhaseRow]:
        """The phases of a step, in the order of LANES."""
        ranks = self.steps[step]
        by_rank = {one.rank: one.phases() for one in ranks}
        total = statistics.fmean(one.seconds for one in ranks)
        names = sorted({name for phases in by_rank.values() for name in phases}, key=_order)
        return [
            _row(step, name, {rank: phases.get(name, 0.0) for rank, phases in by_rank.items()}, total) for name in names
        ]

    def text(self) -> str:
        """The file."""
        records = [one for ranks in self.steps.values() for one in ranks]
        tree = {
            "traceEvents": list(_chrome_events(records)),
            "displayTimeUnit": "ms",
            "clock": CLOCK,
            "steps": [dataclasses.asdict(one) for one in records],
        }
        return to_json(tree) + "\n"

    def write(self, path: Path) -> None:
        """Writes the file. UserError: the disk refuses."""
        write_atomically(path, self.text())


def read_timeline(path: Path) -> Timeline:
    """The time line in a file. UserError: there is none, or it cannot be read."""
    try:
        records = [_rank_times(record) for record in json.loads(path.read_text(encoding="utf-8"))["steps"]]
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist: no step was profiled. Set run.profile, such as run.profile.steps=[3], and train"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"Cannot read {path}: {error!r}; profile a step again with run.profile") from error
    timeline = Timeline()
    for step in sorted({one.step for one in records}):
        timeline = timeline.with_step([one for one in records if one.step == step])
    return timeline


def _rank_times(record: Mapping[str, Any]) -> RankTimes:
    summary = record["operators"]
    operators = summary and TraceSummary(cpu=operators_of(summary["cpu"]), gpu=operators_of(summary["gpu"]))
    spans = tuple(Span(**span) for span in record["spans"])
    found = RankTimes(**{**record, "spans": spans, "operators": operators})
    listed = [] if not operators else [one for kind in (operators.cpu, operators.gpu) for one in chain(*kind.values())]
    _check_types(str, [found.host, *(span.phase for span in spans), *(one.name for one in listed)])
    _check_types(int, [found.step, found.rank, *(one.calls for one in listed)])
    seconds = [value for span in spans for value in (span.start, span.seconds)] + [one.seconds for one in listed]
    _check_types(int | float, [found.start, found.seconds, found.clock_error_s, *seconds])
    return found


def _check_types(kind: type | UnionType, values: Sequence[Any]) -> None:
    for value in values:
        if not isinstance(value, kind):
            raise TypeError(f"{value!r} is no {getattr(kind, '__name__', 'number')}")


def _order(phase: str) -> tuple[int, str]:
    """The place of a phase among the lanes and in tables. The rest of a step comes last."""
    known = LANES.index(phase) if phase in LANES else len(LANES)
    return (len(LANES) + 1 if phase == NO_PHASE else known, phase)


def _row(step: int, phase: str, seconds: Mapping[int, float], total: float) -> PhaseRow:
    slowest, fastest = max(seconds, key=seconds.__getitem__), min(seconds, key=seconds.__getitem__)
    return PhaseRow(
        step=step,
        phase=phase,
        slowest=seconds[slowest],
        slowest_rank=slowest,
        fastest=seconds[fastest],
        fastest_rank=fastest,
        share=statistics.fmean(seconds.values()) / total if total else 0.0,
    )


def _chrome_events(records: Sequence[RankTimes]) -> Iterator[dict[str, Any]]:
    """Events in microseconds, with names for processes and lanes."""
    phases = sorted({span.phase for one in records for span in one.spans}, key=_order)
    lanes = {phase: lane for lane, phase in enumerate(phases)}
    for rank, host in sorted({one.rank: one.host for one in records}.items()):
        yield _name("process_name", rank, 0, name=f"rank {rank} on {host}")
        yield _name("process_sort_index", rank, 0, sort_index=rank)
        for phase, lane in lanes.items():
            yield _name("thread_name", rank, lane, name=phase)
            yield _name("thread_sort_index", rank, lane, sort_index=lane)
    for one in records:
        for span in one.spans:
            yield {
                "ph": "X",
                "name": span.phase,
                "cat": "phase",
                "pid": one.rank,
                "tid": lanes[span.phase],
                "ts": span.start * 1e6,
                "dur": span.seconds * 1e6,
                "args": {"step": one.step},
            }


def _name(kind: str, pid: int, tid: int, **args: Any) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": args}
