"""Traces in Chrome's format: read in pieces, and added up by phase."""

import itertools
import json

import pytest

from megatron_paint.run import trace
from megatron_paint.run.trace import NO_PHASE, OUTSIDE, Operator, Trace, summarise


def event(category, name, start, seconds, thread=1):
    return {"ph": "X", "cat": category, "name": name, "ts": 1e6 * start, "dur": 1e6 * seconds, "tid": thread, "pid": 7}


EVENTS = [
    {"ph": "M", "name": "process_name", "ts": 0.5, "pid": 7, "tid": 0, "args": {"name": 'python, "3"]}'}},
    event("user_annotation", "step", 0, 400),
    event("user_annotation", "rollout", 0, 100),
    event("user_annotation", "gloo:all_reduce", 20, 5),
    event("cpu_op", "A", 10, 50),
    event("cpu_op", "C", 30, 20),
    event("cpu_op", "B", 20, 10),
    event("python_function", "f", 1, 90),
    event("cpu_op", "B", 150, 10),  # between two phases
    event("user_annotation", "student", 200, 100),
    event("cpu_op", "D", 210, 30, thread=2),  # in a thread of autograd
    event("kernel", "K", 250, 5, thread=9),
    event("kernel", "K", 299, 5, thread=9),  # ends after the phase
    event("gpu_memcpy", "copy", 120, 2, thread=9),
    event("user_annotation", "student", 300, 10),
    {"ph": "i", "name": "Record Window End", "ts": 9.0, "s": "g"},
]


def written(path, events=tuple(EVENTS), **further):
    path.write_text(json.dumps({"baseTimeNanoseconds": 5, "traceEvents": list(events), **further}, indent=1))
    return path


def test_time_by_phase_and_operator(tmp_path):
    found = summarise(Trace(written(tmp_path / "t.json")), ["rollout", "student", "mask"])

    def op(name, calls, seconds):
        return Operator(name=name, calls=calls, seconds=seconds)

    assert found.cpu == {
        "rollout": [op(OUTSIDE, 1, 50), op("A", 1, 20), op("C", 1, 20), op("B", 1, 10)],
        "student": [op(OUTSIDE, 2, 110), op("D", 1, 30)],
        NO_PHASE: [op("B", 1, 10)],
    }
    assert found.gpu == {"student": [op("K", 2, 10)], NO_PHASE: [op("copy", 1, 2)]}


def test_only_the_largest_are_kept():
    events = [event("cpu_op", f"op{i}", i, (i + 1) / 100) for i in range(30)]
    (operators,) = summarise(events, []).cpu.values()
    assert [one.name for one in operators] == [f"op{i}" for i in range(29, 17, -1)]


@pytest.mark.parametrize("chunk", [1, 2, 7, 64, 1 << 20])
def test_a_trace_is_read_in_pieces(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(trace, "CHUNK", chunk)
    read = Trace(written(tmp_path / "t.json", traceName="x"))
    assert list(read) == EVENTS
    assert read.header == {"baseTimeNanoseconds": 5, "traceEvents": []}
    assert list(Trace(written(tmp_path / "empty.json", events=()))) == []


def test_a_trace_that_is_cut_short(tmp_path):
    whole = written(tmp_path / "t.json", events=EVENTS[:3], traceName="x").read_text()
    for length in itertools.chain(range(0, len(whole) - 1, 5), [len(whole) - 1]):
        (tmp_path / "cut.json").write_text(whole[:length])
        with pytest.raises(ValueError, match=r"cut\.json is no complete trace"):
            list(Trace(tmp_path / "cut.json"))
