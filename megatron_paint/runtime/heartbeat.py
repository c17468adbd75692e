"""The heartbeat of each rank, and the watchdog that ends a run that hangs.

Long work calls `mark_progress` whenever it advances. In each rank, a thread writes the last heartbeat into a file. If
no rank made progress for too long, the thread writes the stacks of all threads, prints which rank is behind, and ends
the process. Then the job can restart from its last checkpoint. A rank that waits for another rank does not count as
hanging as long as the other one makes progress. A hang is noticed one and a half to two times the limit after the last
progress.
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

LONG_PHASES = ("start", "checkpoint", "export", "evaluation", "profile")
LONG = 10  # factor by which the limit is longer in these phases; ours
WRITE_SECONDS = 10.0
SETTLE_SECONDS = 3.0  # time for all ranks to notice a hang, in addition to one check interval
HUNG = 70  # EX_SOFTWARE
HUNG_RUN = "HUNG"  # this file informs all ranks


@dataclass(frozen=True, kw_only=True)
class Heartbeat:
    """The last progress of one rank."""

    rank: int
    host: str
    pid: int
    step: int
    phase: str
    since: float  # time of the last progress, in seconds since 1970
    written: float  # time of writing this file
    waits: bool = False  # whether it waits for another rank in a collective
    hung: bool = False


class Watchdog:
    """Writes the heartbeat of this process and watches all ranks, from `start` to `stop`."""

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
        """folder: of the heartbeats of all ranks. rank: this process's number in the run, which has `ranks` ranks.

        limit: seconds without progress of any rank after which the run hangs; ten times as many in LONG_PHASES; None:
        no limit. give_up: called with the message about a hang, only on the rank that reports it. Afterwards the
        process ends. write_seconds: time between two writes of the heartbeat; at most a quarter of the limit is used.
        """
        self.folder, self.rank, self.limit, self.give_up = folder, rank, limit, give_up
        self._interval = min(write_seconds, limit / 4) if limit else write_seconds
        self._state = (
            "start",
            0,
            time.time(),
        )  # phase, step, since; a single assignment, so that no thread sees a part of it
        self._phase_begun = time.monotonic()
        self._marking = threading.Lock()  # a thread that samples ahead marks progress beside the one that trains
        self._is_written = False  # whether the last heartbeat is in the file
        self._observer = RankObserver(folder, ranks=ranks, limit=limit or 0.0)
        self._clock, self._moved, self._seen = 0.0, 0.0, self._state
        self._before = self._next_look = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Starts writing and watching. UserError: the folder cannot be written."""
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self._write()
        self._thread.start()

    def stop(self) -> None:
        """Stops watching. The file with the last heartbeat stays."""
        self._ended.set()
        self._thread.join()
        self.mark_progress("end")
        self._write()

    def mark_progress(self, phase: str | None = None, step: int | None = None) -> None:
        """Records that this rank makes progress, and in which phase and step; None: the same as before."""
        with self._marking:
            phase_before, step_before, _ = self._state
            if phase not in (None, phase_before):
                self._phase_begun = time.monotonic()
            self._state = (phase or phase_before, step_before if step is None else step, time.time())

    def phase_now(self) -> tuple[str, int, float]:
        """Phase, step, and seconds in this phase."""
        phase, step, _ = self._state
        return phase, step, time.monotonic() - self._phase_begun

    def _watch(self) -> None:
        self._before = time.monotonic()
        while not self._ended.wait(self._interval):
            self._look(time.monotonic())

    def _look(self, now: float) -> None:
        # At most two intervals count: a process that the batch system suspended did not hang.
        self._clock += min(now - self._before, 2 * self._interval)
        self._before = now
        if self._state is not self._seen:
            self._seen, self._moved = self._state, self._clock
        if self.limit is not None and self._is_hung(self._clock, quiet=self._clock - self._moved):
            self._give_up()
        self._write()

    def _is_hung(self, clock: float, *, quiet: float) -> bool:
        """Whether the run hangs. Rank 0 reads the heartbeats of all ranks; the others do so later."""
        if quiet < self.limit / 2:
            return False
        try:
            if (self.folder / HUNG_RUN).exists():
                return True
        except OSError:  # unknown, so it does not count as a hang
            return False
        if quiet < self.limit * (0.5 if self.rank == 0 else 3.0) or clock < self._next_look:
            return False
        self._next_look = clock + self.limit / 4
        # If the disk refuses this rank's heartbeats, those of other ranks may be outdated too.
        return self._observer.all_quiet(clock) and self._is_written

    def _give_up(self) -> None:
        last_resort = threading.Timer(2 * (self._interval + SETTLE_SECONDS), os._exit, [HUNG])
        last_resort.daemon = True
        last_resort.start()  # the disk itself may hang
        mine = self._write(hung=True)  # before the file that informs the others, who then read this heartbeat
        with suppress(OSError):
            (self.folder / HUNG_RUN).touch()
            with open(self.folder / f"stacks_{self.rank:05d}.txt", "w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        time.sleep(self._interval + SETTLE_SECONDS)
        heartbeats = read_heartbeats(self.folder) or [mine]
        speaker = min((heartbeat.rank for heartbeat in heartbeats if heartbeat.hung), default=self.rank)
        if speaker == self.rank:
            self.give_up(hang_message(heartbeats, folder=self.folder))
        os._exit(HUNG)

    def _write(self, *, hung: bool = False) -> Heartbeat:
        phase, step, since = self._state
        heartbeat = Heartbeat(
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
            unfinished.write_text(json.dumps(asdict(heartbeat)), encoding="utf-8")
            unfinished.replace(self.folder / f"rank_{self.rank:05d}.json")
            self._is_written = True
        except OSError:  # it does not end the run: a broken disk is reported when the next checkpoint is written
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)
        return heartbeat


class RankObserver:
    """Tracks when this rank saw the heartbeats of all ranks change. It uses its own clock: hosts' clocks differ."""

    def __init__(self, folder: Path, *, ranks: int, limit: float) -> None:
        self.folder, self.ranks, self.limit = folder, ranks, limit
        self._moved: dict[int, tuple[float, float]] = {}  # by rank: the last progress, and when it was first seen

    def all_quiet(self, clock: float) -> bool:
        """Whether no rank made progress for as long as its phase allows; False if the heartbeat of a rank is missing.

        clock: this rank's own time in seconds, which never goes back.
        """
        heartbeats = read_heartbeats(self.folder)
        for heartbeat in heartbeats:
            if self._moved.get(heartbeat.rank, (None, 0.0))[0] != heartbeat.since:
                self._moved[heartbeat.rank] = (heartbeat.since, clock)
        return len(heartbeats) >= self.ranks and all(
            clock - self._moved[heartbeat.rank][1] >= self.limit * (LONG if heartbeat.phase in LONG_PHASES else 1)
            for heartbeat in heartbeats
        )


def _is_in_collective() -> bool:
    """Whether the main thread is inside a call of torch.distributed. CUDA work of an earlier call is not visible."""
    frame = sys._current_frames().get(threading.main_thread().ident)
    return frame is not None and str(frame.f_globals.get("__name__")).startswith("torch.distributed.")


def clear_heartbeats(folder: Path) -> None:
    """Removes the heartbeats from before a restart, which may be of more ranks. The stacks of a hang stay."""
    for file in [*folder.glob("rank_*.json"), *folder.glob(".rank_*.unfinished"), folder / HUNG_RUN]:
        with suppress(OSError):
            file.unlink()


def read_heartbeats(folder: Path) -> list[Heartbeat]:
    """The last heartbeat of each rank, ordered by rank; unreadable files are left out."""
    heartbeats, files = [], []
    with suppress(OSError):
        files = sorted(folder.glob("rank_*.json"))
    for file in files:
        with suppress(OSError, ValueError, TypeError):
            heartbeats.append(Heartbeat(**json.loads(file.read_text(encoding="utf-8"))))
    return sorted(heartbeats, key=lambda heartbeat: heartbeat.rank)


def slowest(heartbeats: Sequence[Heartbeat]) -> Heartbeat:
    """The rank that is behind: the one in the earliest step; then one that does not wait for another rank; then the one
    with the oldest progress."""
    return min(heartbeats, key=lambda heartbeat: (heartbeat.step, heartbeat.waits, heartbeat.since, heartbeat.rank))


def hang_message(heartbeats: Sequence[Heartbeat], *, folder: Path, now: float | None = None) -> str:
    """The message that names the rank for which the others wait."""
    last = slowest(heartbeats)
    age = (time.time() if now is None else now) - last.since
    return (
        f"megatron-paint: error: no progress: rank {last.rank} on {last.host} (process {last.pid}) has been in step "
        f"{last.step}, {last.phase}, for {age:.0f} s, and others wait for it. Stacks of each rank: {folder}/"
        "stacks_*.txt. The limit is run.hang_timeout_s; resume the run with run.resume=auto"
    )


_watchdog: Watchdog | None = None


def start_watchdog(watchdog: Watchdog) -> None:
    """Starts the watchdog of this process. From then on `mark_progress` reaches it from every module."""
    global _watchdog
    watchdog.start()
    _watchdog = watchdog


def stop_watchdog() -> None:
    """Stops the watchdog of this process, if there is one."""
    global _watchdog
    if _watchdog is not None:
        _watchdog.stop()
    _watchdog = None


def mark_progress(phase: str | None = None, step: int | None = None) -> None:
    """Records that this process makes progress; None: in the same phase and step. Does nothing without a watchdog."""
    if _watchdog is not None:
        _watchdog.mark_progress(phase, step)


def phase_now() -> tuple[str, int, float] | None:
    """Phase and step of this process, and seconds in this phase; None without a watchdog."""
    return None if (watchdog := _watchdog) is None else watchdog.phase_now()
