"""The time line of profiled steps: what it adds up, and the file."""

import json

import pytest

from megatron_paint.base.errors import UserError
from megatron_paint.run.timeline import PhaseRow, RankTimes, Span, Timeline, read_timeline
from megatron_paint.run.trace import Operator, TraceSummary

OPERATORS = TraceSummary(cpu={"student": [Operator(name="mm", calls=2, seconds=0.25)]}, gpu={})


def times(rank, step=3, seconds=10.0, operators=None, **phases):
    """A rank whose phases follow each other from second 100."""
    spans, at = [Span(phase="step", start=100.0, seconds=sum(phases.values()))], 100.0
    for phase, took in phases.items():
        spans.append(Span(phase=phase.rstrip("_"), start=at, seconds=took))
        at += took
    spans = tuple(spans)
    return RankTimes(
        step=step, rank=rank, host=f"h{rank}", start=100.0, seconds=seconds, spans=spans, operators=operators
    )


def test_phases_of_a_rank():
    """A phase that takes place twice counts twice, in the order of the work; the rest is `other`."""
    one = times(0, student=2.0, rollout=4.0, student_=1.0, transfer=0.5)
    assert one.phases() == {"rollout": 4.0, "student": 3.0, "transfer": 0.5, "other": 2.5}
    assert list(one.phases()) == ["rollout", "student", "transfer", "other"]


def test_rows_of_a_step():
    line = Timeline().with_step([times(1, rollout=4.0, mask=0.0, student=2.0), times(0, rollout=5.0, mask=1.0)])
    assert [one.rank for one in line.steps[3]] == [0, 1]

    def row(phase, slowest, slowest_rank, fastest, fastest_rank, share):
        return PhaseRow(
            step=3,
            phase=phase,
            slowest=slowest,
            slowest_rank=slowest_rank,
            fastest=fastest,
            fastest_rank=fastest_rank,
            share=pytest.approx(share),
        )

    assert line.rows(3) == [
        row("rollout", 5.0, 0, 4.0, 1, 0.45),
        row("mask", 1.0, 0, 0.0, 1, 0.05),
        row("student", 2.0, 1, 0.0, 0, 0.10),
        row("other", 4.0, 0, 4.0, 0, 0.40),
    ]


def test_the_file_is_a_trace_and_is_read_again(tmp_path):
    line = Timeline().with_step([times(0, step=4, rollout=1.0)])
    line = line.with_step([times(0, rollout=5.0, operators=OPERATORS), times(1, student=2.0).moved(7.0, error=0.5)])
    line.write(tmp_path / "timeline.json")
    assert read_timeline(tmp_path / "timeline.json") == line
    assert list(line.steps) == [3, 4]
    events = json.loads((tmp_path / "timeline.json").read_text())["traceEvents"]
    names = {
        (e["pid"], e["tid"] if e["name"] == "thread_name" else None): e["args"]["name"]
        for e in events
        if e["name"] in ("thread_name", "process_name")
    }
    assert names == {
        (0, None): "rank 0 on h0",
        (1, None): "rank 1 on h1",
        **{(rank, lane): name for rank in (0, 1) for lane, name in enumerate(("step", "rollout", "student"))},
    }
    spans = [(e["pid"], names[e["pid"], e["tid"]], e["ts"], e["dur"], e["args"]) for e in events if e["ph"] == "X"]
    assert spans == [
        (0, "step", 100e6, 5e6, {"step": 3}),
        (0, "rollout", 100e6, 5e6, {"step": 3}),
        (1, "step", 107e6, 2e6, {"step": 3}),
        (1, "student", 107e6, 2e6, {"step": 3}),
        (0, "step", 100e6, 1e6, {"step": 4}),
        (0, "rollout", 100e6, 1e6, {"step": 4}),
    ]
    assert all(e["name"] == names[e["pid"], e["tid"]] for e in events if e["ph"] == "X")


def test_a_step_that_is_done_again_replaces_the_earlier_one():
    line = Timeline().with_step([times(0, rollout=5.0), times(1, rollout=5.0)]).with_step([times(0, rollout=1.0)])
    assert [one.phases()["rollout"] for one in line.steps[3]] == [1.0]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, r"timeline\.json does not exist: no step was profiled\. Set run\.profile"),
        ('{"traceEvents": []', r"Cannot read .*timeline\.json"),
        ('{"traceEvents": []}', r"Cannot read .*timeline\.json: KeyError\('steps'\); profile a step again"),
        ('{"steps": [{"step": 1}]}', r"Cannot read .*timeline\.json"),
    ],
)
def test_a_file_that_cannot_be_read(tmp_path, text, says):
    if text is not None:
        (tmp_path / "timeline.json").write_text(text)
    with pytest.raises(UserError, match=says):
        read_timeline(tmp_path / "timeline.json")
