"""The profile of chosen steps (`run.profile`): traces of torch's profiler, and the time line of all ranks.

Outside of the chosen steps nothing is recorded. torch's profiler and the time line get the phases from the run's own
timers, so that both agree with metrics.jsonl.
"""

import os
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from megatron_paint.base.errors import UserError
from megatron_paint.config.profile import ProfileSettings
from megatron_paint.run.console import Progress
from megatron_paint.run.folder import RunFolder
from megatron_paint.run.timeline import STEP, RankTimes, Span, Timeline, read_timeline
from megatron_paint.run.trace import TraceSummary
from megatron_paint.runtime.heartbeat import mark_progress
from megatron_paint.runtime.stop import StopRequested
from megatron_paint.runtime.timer import observe_phases
from megatron_paint.training.trace_file import write_trace

if TYPE_CHECKING:
    from torch.profiler import profile

    from megatron_paint.mcore.ranks import Ranks

GPU_PHASES = {"rollout", "teacher", "student", "optimizer", "evaluation"}  # those that always work on a GPU


@dataclass(kw_only=True)
class StepProfiler:
    """Profiles the chosen steps of a run. Every rank has one."""

    settings: ProfileSettings
    folder: RunFolder
    ranks: "Ranks"
    progress: Progress
    confirm_owner: Callable[[], None]  # raises UserError on all ranks if another process owns the folder now
    _is_warm: bool = field(default=False, init=False)

    @contextmanager
    def __call__(self, step: int) -> Iterator[None]:
        """Profiles the `with` block if the step is chosen: a step and what follows it. All ranks call together.

        A profile that cannot be written is a warning. A step after which the run is asked to stop leaves none: the
        checkpoint comes first.
        """
        if step not in self.settings.steps:
            yield
            return
        recorder = self._begin(step)
        try:
            yield
        except BaseException as error:  # torch must not end with its profiler running
            recorder.stop()
            if isinstance(error, StopRequested):
                self.progress.warn(f"the run stops after step {step}, so the profile of this step is not written")
            raise
        recorder.stop()
        self._write(step, recorder)

    def _begin(self, step: int) -> "Recorder":
        """Starts recording on all ranks together, so that no rank waits for another inside of the step."""
        from megatron_paint.mcore.collectives import all_ranks_do

        is_traced = self.ranks.rank in self.settings.ranks
        if is_traced and not self._is_warm:
            self._is_warm = True
            with suppress(Exception), self._torch_profile():  # the first one takes seconds: it loads the profiler
                pass  # if this fails, so does the next one, which says why
        recorder = Recorder(self._torch_profile if is_traced else None, self.settings.phases)
        self.confirm_owner()
        if self.ranks.rank == 0:
            with suppress(UserError):  # a disk that refuses this refuses the new files too, which is a warning
                self.folder.remove_traces(step)
        all_ranks_do(self.ranks, lambda: None)
        recorder.start()
        return recorder

    def _torch_profile(self) -> "profile":
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it prints two lines on stderr for each trace
        from torch.profiler import ProfilerActivity, profile

        gpu = [ProfilerActivity.CUDA] if self.ranks.device.type == "cuda" else []
        return profile(
            activities=[ProfilerActivity.CPU, *gpu],
            profile_memory=self.settings.memory,
            with_stack=self.settings.stacks,
        )

    def _write(self, step: int, recorder: "Recorder") -> None:
        """Writes the trace of this rank if it has one; then rank 0 writes the time line."""
        from megatron_paint.mcore.clocks import clock_offsets
        from megatron_paint.mcore.collectives import gather_entries

        mark_progress("profile", step)
        self.confirm_owner()
        offsets = clock_offsets(self.ranks)
        summary, problem = self._write_trace(step, recorder)
        times = recorder.times(step=step, rank=self.ranks.rank, operators=summary)
        found = gather_entries({self.ranks.rank: (times, problem)}, self.ranks)
        if self.ranks.rank != 0:
            return
        since_1970 = time.time() - time.perf_counter()
        everyone = [
            one.moved(since_1970 - offsets[rank].seconds, error=offsets[rank].error) for rank, (one, _) in found.items()
        ]
        problems = [problem for _, problem in found.values() if problem]
        for message in problems:
            self.progress.warn(f"the profile of step {step} is not complete: {message}")
        try:
            self._timeline().with_step(everyone).write(self.folder.timeline_file)
        except UserError as error:
            self.progress.warn(f"the profile of step {step} is not complete: {error}")
            return
        self.progress.note(
            f"profile of step {step} is in {self.folder.profile}: `megatron-paint inspect profile {self.folder.path}` "
            "prints where the time went"
        )

    def _write_trace(self, step: int, recorder: "Recorder") -> tuple[TraceSummary | None, str]:
        """Returns what the trace says about operators, and a message if it could not be written."""
        if recorder.problem or not recorder.traces:  # or it is not traced, or no phase that is traced took place
            return None, recorder.problem
        path = self.folder.trace_file(step, self.ranks.rank)
        phases = {span.phase for span in recorder.spans} - {STEP}
        try:
            summary = write_trace(recorder.traces, path, phases=phases)
        except UserError as error:
            return None, str(error)
        except RuntimeError as error:
            return None, f"torch's profiler has failed: {error!r}"
        is_expected = self.settings.phases is None or GPU_PHASES & phases & {*self.settings.phases}
        if self.ranks.device.type == "cuda" and is_expected and not summary.gpu:
            return summary, (
                f"{path} has no work of the GPU. Set KINETO_LOG_LEVEL=1 in the environment to see why: often the "
                "driver lets only root profile"
            )
        return summary, ""

    def _timeline(self) -> Timeline:
        """The time line so far. One that cannot be read is replaced."""
        try:
            return read_timeline(self.folder.timeline_file)
        except UserError:
            return Timeline()


class Recorder:
    """Records the phases of one step on this rank, and on a traced rank what torch does.

    make_trace: makes a profiler of torch, which records; None: this rank is not traced. phases: those that are traced;
    None: everything from `start` to `stop`.
    """

    def __init__(self, make_trace: "Callable[[], profile] | None", phases: Collection[str] | None) -> None:
        self.spans: list[Span] = []
        self.traces: list[profile] = []  # in the order of time
        self.problem = ""  # why a trace is missing
        self._make_trace, self._phases = make_trace, phases
        self._traced: profile | None = None  # it runs
        self._started = self._ended = 0.0

    @property
    def is_traced(self) -> bool:
        return self._make_trace is not None

    def start(self) -> None:
        """Begins. A trace begins before the time of the step and ends after it."""
        if self.is_traced and self._phases is None:
            self._start_trace()
        observe_phases(self)
        self._started = time.perf_counter()

    def stop(self) -> None:
        """Ends."""
        self._ended = time.perf_counter()
        observe_phases(None)
        self._stop_trace()

    def begin(self, phase: str) -> "Begun":
        """Called by a timer before a phase."""
        in_main_thread = threading.current_thread() is threading.main_thread()  # torch records this one
        starts = in_main_thread and self.is_traced and phase in (self._phases or ()) and self._traced is None
        if starts:
            self._start_trace()
        annotation = None
        if in_main_thread and self._traced is not None:
            import torch

            if torch.cuda.is_available():
                torch.cuda.synchronize()  # the range has only the work of its own phase
            annotation = torch.profiler.record_function(phase)
            annotation.__enter__()
        return Begun(phase, annotation, starts)

    def end(self, begun: "Begun", started: float, ended: float | None) -> None:
        """Called by a timer after a phase."""
        if begun.annotation is not None:
            begun.annotation.__exit__(None, None, None)
        if begun.starts_trace:
            self._stop_trace()
        ended = time.perf_counter() if ended is None else ended
        self.spans.append(Span(phase=begun.phase, start=started, seconds=ended - started))

    def _start_trace(self) -> None:
        try:
            trace = self._make_trace()
            trace.start()
        except Exception as error:  # of any kind, such as another profiler that runs: it ends no run
            self.problem = f"torch's profiler does not start: {error!r}"
        else:
            self._traced = trace

    def _stop_trace(self) -> None:
        if self._traced is None:
            return
        trace, self._traced = self._traced, None
        try:
            trace.stop()
        except Exception as error:  # of any kind: what torch makes of its records ends no run
            self.problem = f"torch's profiler has failed: {error!r}"
        else:
            self.traces.append(trace)

    def times(self, *, step: int, rank: int, operators: TraceSummary | None) -> RankTimes:
        """The step on this rank, by the clock of this rank."""
        return RankTimes(
            step=step,
            rank=rank,
            host=socket.gethostname(),
            start=self._started,
            seconds=self._ended - self._started,
            spans=tuple(sorted(self.spans, key=lambda span: span.start)),
            operators=operators,
        )


@dataclass(frozen=True)
class Begun:
    """A phase that has begun."""

    phase: str
    annotation: Any  # its range in the trace; None without a trace
    starts_trace: bool  # whether the trace ends with it
