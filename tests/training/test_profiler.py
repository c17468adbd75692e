"""The profiler of steps on one rank: what it records, what ends it, and what it says where it cannot write."""

import gzip
import json
import time
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch

from megatron_paint.base.errors import UserError
from megatron_paint.config.profile import ProfileSettings
from megatron_paint.mcore import clocks, collectives
from megatron_paint.run.folder import RunFolder
from megatron_paint.run.timeline import read_timeline
from megatron_paint.runtime import timer as timer_module
from megatron_paint.runtime.stop import StopRequested
from megatron_paint.runtime.timer import Timer
from megatron_paint.training.profiler import StepProfiler


class Said(list):
    """A console that keeps what it prints."""

    def note(self, message):
        self.append(("note", message))

    def warn(self, message):
        self.append(("warning", message))


@pytest.fixture
def profiler(tmp_path, monkeypatch):
    """Makes a profiler of a single rank."""
    monkeypatch.setattr(collectives, "all_ranks_do", lambda ranks, act: [act()])
    monkeypatch.setattr(collectives, "gather_entries", lambda mine, ranks: mine)
    monkeypatch.setattr(clocks, "clock_offsets", lambda ranks: {0: clocks.ClockOffset(seconds=0.0, error=0.0)})
    (tmp_path / "run").mkdir()

    def make(**settings):
        return StepProfiler(
            settings=ProfileSettings(**{"steps": (2, 3), **settings}),
            folder=RunFolder(tmp_path / "run"),
            ranks=SimpleNamespace(rank=0, size=1, device=torch.device("cpu")),
            progress=Said(),
            confirm_owner=lambda: None,
        )

    return make


def work(timer):
    """A step with two phases, and a checkpoint after it."""
    with timer("step"):
        with timer("teacher"):
            torch.mm(torch.ones(8, 8), torch.ones(8, 8))
        with timer("student"):
            for _ in range(3):
                torch.tanh(torch.ones(4))
    with Timer()("checkpoint"):
        torch.ones(2).clone()


def trace(profiler, step):
    return json.loads(gzip.open(profiler.folder.trace_file(step, 0)).read())["traceEvents"]


def names(events, category):
    return [e["name"] for e in sorted(events, key=lambda e: e["ts"]) if e.get("cat") == category]


def test_only_chosen_steps_are_recorded(profiler):
    profiler, timer = profiler(), Timer()
    for step in (1, 2, 4):
        with profiler(step):
            assert (timer_module._observer is not None) == (step == 2)
            assert torch.autograd._profiler_enabled() == (step == 2)
            work(timer)
    assert sorted(file.name for file in profiler.folder.profile.iterdir()) == [
        "step_000002_rank_0000.trace.json.gz",
        "timeline.json",
    ]
    events = trace(profiler, 2)
    assert names(events, "user_annotation") == ["step", "teacher", "student", "checkpoint"]
    assert names(events, "cpu_op").count("aten::tanh") == 3
    ((one,),) = read_timeline(profiler.folder.timeline_file).steps.values()
    assert [span.phase for span in one.spans] == ["step", "teacher", "student", "checkpoint"]
    assert abs(one.start - time.time()) < 600
    calls = {op.name: op.calls for op in one.operators.cpu["student"]}
    assert (calls["aten::tanh"], calls["(no operator)"]) == (3, 1)
    assert "aten::mm" not in calls
    (said,) = profiler.progress
    assert said[0] == "note"
    assert said[1].startswith("profile of step 2 is in ")


def test_chosen_phases_become_one_trace(profiler):
    profiler, timer = profiler(phases=("teacher", "checkpoint")), Timer()
    with profiler(3):
        work(timer)
        with timer("teacher"):
            torch.sigmoid(torch.ones(3))
    events = trace(profiler, 3)
    assert names(events, "user_annotation") == ["teacher", "checkpoint", "teacher"]
    operators = names(events, "cpu_op")
    assert "aten::mm" in operators
    assert "aten::sigmoid" in operators
    assert "aten::tanh" not in operators
    ((one,),) = read_timeline(profiler.folder.timeline_file).steps.values()
    assert [span.phase for span in one.spans] == ["step", "teacher", "student", "checkpoint", "teacher"]
    assert set(one.operators.cpu) == {"teacher", "checkpoint"}
    for name, spans in (("teacher", 2), ("checkpoint", 1)):
        found = sorted(e["ts"] for e in events if e.get("cat") == "user_annotation" and e["name"] == name)
        begun = [span.start for span in one.spans if span.phase == name]
        assert len(found) == spans
        # The parts have one clock.
        assert [1e-6 * (at - found[0]) for at in found] == pytest.approx([at - begun[0] for at in begun], abs=0.1)


def test_a_phase_that_does_not_take_place(profiler):
    profiler = profiler(phases=("export",))
    with profiler(2):
        work(Timer())
    assert [file.name for file in profiler.folder.profile.iterdir()] == ["timeline.json"]
    assert [kind for kind, _ in profiler.progress] == ["note"]


@pytest.mark.parametrize("phases", [None, ("student",)])
@pytest.mark.parametrize("error", [UserError("no"), StopRequested(step=2, reason="SIGINT"), KeyboardInterrupt()])
def test_an_error_ends_the_recording(profiler, error, phases):
    """torch crashes at the end of a process whose profiler runs."""
    profiler = profiler(stacks=True, phases=phases)
    with pytest.raises(type(error)), profiler(2), Timer()("student"):
        raise error
    assert not torch.autograd._profiler_enabled()
    assert timer_module._observer is None
    assert not profiler.folder.profile.exists()
    stops = isinstance(error, StopRequested)
    assert profiler.progress == [
        ("warning", "the run stops after step 2, so the profile of this step is not written")
    ] * int(stops)


def test_a_phase_that_ends_by_an_error(profiler):
    """As in a step that is skipped because a loss is not finite."""
    profiler = profiler()
    with profiler(2), suppress(FloatingPointError), Timer()("student"):
        raise FloatingPointError
    ((one,),) = read_timeline(profiler.folder.timeline_file).steps.values()
    assert [span.phase for span in one.spans] == ["student"]
    assert 0 < one.spans[0].seconds < one.seconds


def test_memory_and_stacks(profiler):
    profiler = profiler(memory=True, stacks=True)
    with profiler(2):
        work(Timer())
    events = trace(profiler, 2)
    assert "[memory]" in names(events, "cpu_instant_event")
    assert any("test_profiler.py" in name and "work" in name for name in names(events, "python_function"))


def test_the_traces_of_an_earlier_attempt_are_replaced(profiler):
    profiler = profiler()
    profiler.folder.profile.mkdir()
    earlier = ("step_000002_rank_0007.trace.json.gz", ".step_000002_rank_0000.trace.json.gz.99.part0.tmp")
    for name in (*earlier, "step_000003_rank_0000.trace.json.gz"):
        (profiler.folder.profile / name).write_text("of an earlier attempt")
    profiler.folder.timeline_file.write_text("{cut short")
    with profiler(2):
        work(Timer())
    assert sorted(file.name for file in profiler.folder.profile.iterdir()) == [
        "step_000002_rank_0000.trace.json.gz",
        "step_000003_rank_0000.trace.json.gz",
        "timeline.json",
    ]
    assert trace(profiler, 2)
    assert list(read_timeline(profiler.folder.timeline_file).steps) == [2]


def test_a_disk_that_refuses_is_a_warning(profiler):
    profiler = profiler()
    profiler.folder.profile.write_text("a file in place of the folder")
    with profiler(2):
        work(Timer())
    warnings = [message for kind, message in profiler.progress if kind == "warning"]
    assert len(warnings) == 2
    for message, file in zip(warnings, ("step_000002_rank_0000.trace.json.gz", "timeline.json"), strict=True):
        assert message.startswith(
            f"the profile of step 2 is not complete: Cannot write {profiler.folder.profile}/{file}"
        )
    assert not any(kind == "note" for kind, _ in profiler.progress)


@pytest.mark.parametrize(
    ("method", "error"),
    [
        ("start", RuntimeError("another one runs")),
        ("stop", UnicodeDecodeError("utf-8", b"\x9a", 0, 1, "invalid")),
        ("export_chrome_trace", RuntimeError("no trace")),
    ],
)
def test_torch_s_own_failures_are_warnings(profiler, monkeypatch, method, error):
    def fails(self, *arguments):
        if method == "stop":
            stop(self)
        raise error

    profiler = profiler()
    stop = torch.profiler.profile.stop
    monkeypatch.setattr(torch.profiler.profile, method, fails)
    with profiler(2):
        work(Timer())
    (warning,) = (message for kind, message in profiler.progress if kind == "warning")
    assert warning.startswith("the profile of step 2 is not complete: torch's profiler ")
    assert warning.endswith(repr(error))
    ((one,),) = read_timeline(profiler.folder.timeline_file).steps.values()
    assert one.operators is None
    assert {span.phase for span in one.spans} == {"step", "teacher", "student", "checkpoint"}
    assert [file.name for file in profiler.folder.profile.iterdir()] == ["timeline.json"]


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize(("phases", "warns"), [(None, True), (("student",), True), (("checkpoint",), False)])
def test_a_trace_without_work_of_the_gpu(profiler, phases, warns):
    """Here the GPU is one in name only, so that no trace has its work."""
    profiler = profiler(phases=phases)
    profiler.ranks.device = torch.device("cuda")
    with profiler(2):
        work(Timer())
    assert trace(profiler, 2)
    warnings = [message for kind, message in profiler.progress if kind == "warning"]
    assert len(warnings) == int(warns)
    assert all("rank_0000.trace.json.gz has no work of the GPU. Set KINETO_LOG_LEVEL=1" in text for text in warnings)
