"""Starts the ranks of a run on this machine, watches them, ends them together, and prints once why they ended."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from megatron_paint.base.errors import UserError
from megatron_paint.config.megatron import MegatronSettings
from megatron_paint.launch.exit_status import ended_by, reason
from megatron_paint.launch.failure_notes import NOTES_FOLDER, read_failure_notes
from megatron_paint.planning.layout import fewest_processes
from megatron_paint.runtime.processes import LAUNCHER
from megatron_paint.runtime.signals import RecordedSignals
from megatron_paint.runtime.stop import STOPPED, STOPPING

ENDING = (signal.SIGHUP, *STOPPING)
POLL_SECONDS = 0.05
SETTLE_SECONDS = 0.5  # a killed rank may be noticed after a rank that only lost its connection to it
GRACE_SECONDS = 5.0  # after a failure of another rank: time to remove unfinished files


def number_of_processes(megatron: MegatronSettings, asked: int | None) -> int:
    """`--processes`. The default is one per GPU; without GPUs it is the number that one replica of the model needs."""
    import torch

    gpus = torch.cuda.device_count()
    if asked is None:
        return gpus or fewest_processes(megatron)
    if asked < 1:
        raise UserError(f"--processes must be at least 1, got {asked}")
    if gpus and asked > gpus:
        raise UserError(
            f"--processes={asked} is above the number of GPUs here, {gpus}, and each process drives one: give at most "
            f"{gpus}, or start ranks on several machines with torchrun or srun"
        )
    return asked


def run_here(
    arguments: Sequence[str],
    processes: int,
    *,
    prepare: Callable[[str], None] = lambda folder: None,
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
    interrupted: Callable[[], str] = str,
    kept: Callable[[], str] = str,
) -> int:
    """Runs `megatron-paint ARGUMENTS` in so many processes and returns the exit status of the run.

    0: all ranks succeeded; 2: a mistake of the user; 1: a rank failed or was killed; 75: stopped early with a
    checkpoint; 128 + signal: a signal to the launcher ended the run. The first Ctrl-C, SIGTERM or SIGUSR1 is passed to
    the ranks, which stop after their step; a second signal ends them. An error of the ranks is printed once. No rank
    outlives this call. prepare: writes into the folder that the ranks share with this process what they need of it.
    say: prints a line. interrupted: the line for the first Ctrl-C, "" for none. kept: what remains if the run ends now.
    """
    from torch.distributed import TCPStore

    # The ranks connect through a store of the launcher, as under torchrun, so that no port has to be guessed.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory(prefix="megatron_paint_") as notes, _LauncherSignals() as signals:
        ranks: list[subprocess.Popen] = []
        prepare(notes)
        try:
            for rank in range(processes):
                ranks.append(_start(arguments, _environment(rank, processes, store.port, notes)))
            _watch(ranks, signals, on_interrupt=lambda: say(interrupted()))
            exits = [rank.poll() for rank in ranks]
        finally:
            _end(ranks, grace=0.0 if signals.asks_to_end else GRACE_SECONDS)
        message, status = reason(exits, read_failure_notes(notes))
        if signals.asks_to_end or (signals.signal and status not in (0, STOPPED)):
            message, status = ended_by(signals.signal, kept())
    if message:
        say(message)
    return status


class _LauncherSignals(RecordedSignals):
    """The signals that ask this process to end."""

    def __init__(self) -> None:
        super().__init__(
            ENDING
        )  # nohup, and a shell for background jobs, set some of them to ignored: those stay ignored

    @property
    def asks_to_stop(self) -> bool:
        """Whether exactly one signal came, and it lets a run stop after its step."""
        return self.count == 1 and self.signal in STOPPING

    @property
    def asks_to_end(self) -> bool:
        return self.count > 0 and not self.asks_to_stop


def _environment(rank: int, processes: int, port: int, notes: str) -> dict[str, str]:
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    # Python cleans up after a worker pool whose rank was killed, and would print a warning about it.
    warnings = ",".join(filter(None, (os.environ.get("PYTHONWARNINGS"), "ignore:resource_tracker")))
    ours = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "PYTHONWARNINGS": warnings,
        LAUNCHER: str(os.getpid()),
        NOTES_FOLDER: notes,
    }
    return {"OMP_NUM_THREADS": threads} | os.environ | ours


def _start(arguments: Sequence[str], environment: dict[str, str]) -> subprocess.Popen:
    """One rank in a separate process group: Ctrl-C reaches only the launcher, and the workers end with their rank."""
    command = [sys.executable, "-m", "megatron_paint", *arguments]
    return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, process_group=0)


def _watch(ranks: Sequence[subprocess.Popen], signals: _LauncherSignals, *, on_interrupt: Callable[[], None]) -> None:
    """Returns when all ranks have ended, soon after a rank failed, or when a signal asks for the end.

    on_interrupt: called at the first Ctrl-C.
    """
    failed_at, passed_on = None, False
    while not signals.asks_to_end and None in [rank.poll() for rank in ranks]:  # asks every rank, not only the first
        if signals.asks_to_stop and not passed_on:
            passed_on = True
            if signals.signal == signal.SIGINT:
                on_interrupt()
            for rank in ranks:
                with suppress(ProcessLookupError):
                    rank.send_signal(signals.signal)
        if failed_at is None and any(rank.returncode not in (None, 0, STOPPED) for rank in ranks):
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() > failed_at + SETTLE_SECONDS:
            return
        time.sleep(POLL_SECONDS)


def _end(ranks: Sequence[subprocess.Popen], *, grace: float) -> None:
    """Ends the remaining ranks and all their processes. grace: seconds in which they may end on their own."""
    for rank in ranks:
        if rank.poll() is None:
            _signal_group(rank, signal.SIGTERM)
    deadline = time.monotonic() + grace
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    for rank in ranks:
        _signal_group(rank, signal.SIGKILL)
        rank.wait()


def _signal_group(rank: subprocess.Popen, number: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(rank.pid, number)
