"""A sign of life of each rank, and the watch that ends a run which has none.

Whatever takes long says `beat(phase)` as it goes on. A thread writes the last beat to a file of the rank's own. Where
no rank has had one for too long it writes down where all threads stand, says which rank is behind, and ends the
process, so that the job can start again from its last checkpoint. A rank that only waits for one that goes on is well.
A hang is noticed one and a half to two times the limit after the last beat.
"""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_paint.runtime.files import disk_errors

LONG_PHASES = ("start", "checkpoint", "export", "evaluation")
LONG = 10  # times as long may those take between two beats; ours
WRITE_SECONDS = 10.0
SETTLE_SECONDS = 3.0  # beyond one look of every rank, for all to notice
HUNG = 70  # EX_SOFTWARE
HUNG_RUN = "HUNG"  # the file that tells all ranks


@dataclass(frozen=True, kw_only=True)
class Beat:
    """What one rank was last seen doing."""

    rank: int
    host: str
    pid: int
    step: int
    phase: str
    since: float  # of the last beat, in seconds since 1970
    written: float  # of this file
    waits: bool = False  # for another rank, in a collective
    hung: bool = False


class Heart:
    """The heartbeat of this process, from `start` to `stop`."""

    def __init__(
        self,
        folder: Path,
        *,
        rank: int,
        ranks: int,
        limit: float | None,
        give_up: Callable[[str], None],
        write_seconds: float = WRITE_SECONDS,
    ) -> None:
        """ranks: of the run; limit: seconds that all may be without a beat, None: no watch; give_up: what is done with
        the reason on the rank that speaks for all; the process ends after it."""
        self.folder, self.rank, self.limit, self.give_up = folder, rank, limit, give_up
        self._interval = min(write_seconds, limit / 4) if limit else write_seconds
        self._state = ("start", 0, time.time())  # phase, step, since: one assignment, seen whole
        self._is_written = False  # the last beat
        self._others = Others(folder, ranks=ranks, limit=limit or 0.0)
        self._clock, self._moved, self._seen = 0.0, 0.0, self._state
        self._before = self._next_look = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Begins to write and to watch. UserError: the folder cannot be written."""
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self._write()
        self._thread.start()

    def stop(self) -> None:
        """Ends the watch; the file stays as the last sign."""
        self._ended.set()
        self._thread.join()
        self.beat("end")
        self._write()

    def beat(self, phase: str | None = None, step: int | None = None) -> None:
        """Says that this rank goes on, and with what; None: with the same."""
        phase_before, step_before, _ = self._state
        self._state = (phase or phase_before, step_before if step is None else step, time.time())

    def _watch(self) -> None:
        self._before = time.monotonic()
        while not self._ended.wait(self._interval):
            self._look(time.monotonic())

    def _look(self, now: float) -> None:
        # At most twice what was waited: a process that its batch system suspended has not been hanging.
        self._clock += min(now - self._before, 2 * self._interval)
        self._before = now
        if self._state is not self._seen:
            self._seen, self._moved = self._state, self._clock
        if self.limit is not None and self._is_hung(self._clock, quiet=self._clock - self._moved):
            self._give_up()
        self._write()

    def _is_hung(self, clock: float, *, quiet: float) -> bool:
        """Whether the run is: rank 0 finds out, which reads what all have written; another only where it does not."""
        if quiet < self.limit / 2:
            return False
        try:
            if (self.folder / HUNG_RUN).exists():
                return True
        except OSError:  # it is not known to hang
            return False
        if quiet < self.limit * (0.5 if self.rank == 0 else 3.0) or clock < self._next_look:
            return False
        self._next_look = clock + self.limit / 4
        # With a disk that refuses this rank's beats, those of the others may be old ones as well.
        return self._others.all_quiet(clock) and self._is_written

    def _give_up(self) -> None:
        last_resort = threading.Timer(2 * (self._interval + SETTLE_SECONDS), os._exit, [HUNG])
        last_resort.daemon = True
        last_resort.start()  # a disk may be what hangs
        mine = self._write(hung=True)  # before the file that tells the others: who sees that one sees this beat
        with suppress(OSError):
            (self.folder / HUNG_RUN).touch()
            with open(self.folder / f"stacks_{self.rank:05d}.txt", "w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        time.sleep(self._interval + SETTLE_SECONDS)
        beats = read_beats(self.folder) or [mine]
        speaker = min((beat.rank for beat in beats if beat.hung), default=self.rank)
        if speaker == self.rank:
            self.give_up(hang_message(beats, folder=self.folder))
        os._exit(HUNG)

    def _write(self, *, hung: bool = False) -> Beat:
        phase, step, since = self._state
        beat = Beat(
            rank=self.rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            step=step,
            phase=phase,
            since=since,
            written=time.time(),
            waits=_is_in_collective(),
            hung=hung,
        )
        unfinished = self.folder / f".rank_{self.rank:05d}.{os.getpid()}.unfinished"
        self._is_written = False
        try:
            unfinished.write_text(json.dumps(asdict(beat)), encoding="utf-8")
            unfinished.replace(self.folder / f"rank_{self.rank:05d}.json")
            self._is_written = True
        except OSError:  # not worth ending a run for: a disk that refuses it refuses the next checkpoint aloud
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)
        return beat


class Others:
    """What one rank has seen of all ranks' beats, by a clock of its own: hosts' clocks differ."""

    def __init__(self, folder: Path, *, ranks: int, limit: float) -> None:
        self.folder, self.ranks, self.limit = folder, ranks, limit
        self._moved: dict[int, tuple[float, float]] = {}  # by rank: the last beat, and when it was first seen

    def all_quiet(self, clock: float) -> bool:
        """Whether no rank has been seen to beat for as long as its phase may take; False where one is not known."""
        beats = read_beats(self.folder)
        for beat in beats:
            if self._moved.get(beat.rank, (None, 0.0))[0] != beat.since:
                self._moved[beat.rank] = (beat.since, clock)
        return len(beats) >= self.ranks and all(
            clock - self._moved[beat.rank][1] >= self.limit * (LONG if beat.phase in LONG_PHASES else 1)
            for beat in beats
        )


def _is_in_collective() -> bool:
    """Whether the main thread stands in a call of torch.distributed. What CUDA has yet to do of an earlier one does not
    show here."""
    frame = sys._current_frames().get(threading.main_thread().ident)
    return frame is not None and str(frame.f_globals.get("__name__")).startswith("torch.distributed.")


def clear_beats(folder: Path) -> None:
    """Removes the beats of an earlier life, which may have had more ranks; the stacks of its hang stay."""
    for file in [*folder.glob("rank_*.json"), *folder.glob(".rank_*.unfinished"), folder / HUNG_RUN]:
        with suppress(OSError):
            file.unlink()


def read_beats(folder: Path) -> list[Beat]:
    """The last beat of each rank, by rank; what cannot be read is left out."""
    beats, files = [], []
    with suppress(OSError):
        files = sorted(folder.glob("rank_*.json"))
    for file in files:
        with suppress(OSError, ValueError, TypeError):
            beats.append(Beat(**json.loads(file.read_text(encoding="utf-8"))))
    return sorted(beats, key=lambda beat: beat.rank)


def slowest(beats: Sequence[Beat]) -> Beat:
    """The rank that is behind: of those in the earliest step one that does not wait for another, or else the one whose
    last beat is the oldest."""
    return min(beats, key=lambda beat: (beat.step, beat.waits, beat.since, beat.rank))


def hang_message(beats: Sequence[Beat], *, folder: Path, now: float | None = None) -> str:
    """Which rank the others wait for, and where to look."""
    last = slowest(beats)
    age = (time.time() if now is None else now) - last.since
    return (
        f"megatron-paint: error: no progress: rank {last.rank} on {last.host} (process {last.pid}) has been in step "
        f"{last.step}, {last.phase}, for {age:.0f} s, and others wait for it. Where each rank stands: {folder}/"
        "stacks_*.txt. run.hang_timeout_s is the limit; the run goes on with run.resume=auto"
    )


_heart: Heart | None = None


def start_heart(heart: Heart) -> None:
    """Makes a heart that of this process: `beat` reaches it from everywhere."""
    global _heart
    heart.start()
    _heart = heart


def stop_heart() -> None:
    """Ends the heart of this process, if there is one."""
    global _heart
    if _heart is not None:
        _heart.stop()
    _heart = None


def beat(phase: str, step: int | None = None) -> None:
    """Says that this process goes on, and with what; nothing where no run has started a heart."""
    if _heart is not None:
        _heart.beat(phase, step)


def go_on() -> None:
    """Says that this process goes on with what it does."""
    if _heart is not None:
        _heart.beat()
