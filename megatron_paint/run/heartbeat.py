"""A sign of life of each rank, and the watch that ends a run which has none.

Whatever takes long says `beat(phase)` as it goes on. A thread writes the last beat to a file of the rank's own. Where
there has been none for too long it writes down where all threads stand, says which rank is behind, and ends the
process, so that the job can start again from its last checkpoint.
"""

import faulthandler
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_paint.disk import disk_errors

LONG_PHASES = ("start", "checkpoint", "export", "evaluation")
LONG = 10  # times as long may those take between two beats; ours
WRITE_SECONDS = 10.0
SETTLE_SECONDS = 3.0  # for all ranks to notice
HUNG = 70  # EX_SOFTWARE


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
    hung: bool = False


class Heart:
    """The heartbeat of this process, from `start` to `stop`."""

    def __init__(
        self,
        folder: Path,
        *,
        rank: int,
        limit: float | None,
        give_up: Callable[[str], None],
        write_seconds: float = WRITE_SECONDS,
    ) -> None:
        """limit: seconds between two beats, None: no watch; give_up: what is done with the reason on the rank that
        speaks for all; the process ends after it."""
        self.folder, self.rank, self.limit, self.give_up = folder, rank, limit, give_up
        self._interval = min(write_seconds, limit / 4) if limit else write_seconds
        self._state = ("start", 0, time.time())  # phase, step, since: one assignment, seen whole
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
        while not self._ended.wait(self._interval):
            self._write()
            phase, _, since = self._state
            if self.limit is not None and time.time() - since > self.limit * (LONG if phase in LONG_PHASES else 1):
                self._give_up()

    def _give_up(self) -> None:
        with suppress(OSError), open(self.folder / f"stacks_{self.rank:05d}.txt", "w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        self._write(hung=True)
        time.sleep(SETTLE_SECONDS)
        beats = read_beats(self.folder)
        speaker = min((beat.rank for beat in beats if beat.hung), default=self.rank)
        if speaker == self.rank:
            self.give_up(hang_message(beats, folder=self.folder))
        os._exit(HUNG)

    def _write(self, *, hung: bool = False) -> None:
        phase, step, since = self._state
        beat = Beat(
            rank=self.rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            step=step,
            phase=phase,
            since=since,
            written=time.time(),
            hung=hung,
        )
        # A sign of life is not worth ending a run for: a disk that refuses it refuses the next checkpoint aloud.
        with suppress(OSError):
            unfinished = self.folder / f".rank_{self.rank:05d}.{os.getpid()}.unfinished"
            unfinished.write_text(json.dumps(asdict(beat)), encoding="utf-8")
            unfinished.replace(self.folder / f"rank_{self.rank:05d}.json")


def read_beats(folder: Path) -> list[Beat]:
    """The last beat of each rank, by rank; what cannot be read is left out."""
    beats = []
    for file in sorted(folder.glob("rank_*.json")):
        with suppress(OSError, ValueError, TypeError):
            beats.append(Beat(**json.loads(file.read_text(encoding="utf-8"))))
    return sorted(beats, key=lambda beat: beat.rank)


def slowest(beats: Sequence[Beat]) -> Beat:
    """The rank that is behind: of those in the earliest step the one whose last beat is the oldest."""
    return min(beats, key=lambda beat: (beat.step, beat.since, beat.rank))


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
