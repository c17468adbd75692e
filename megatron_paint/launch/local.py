"""Starts the ranks of a run on this machine, watches them, ends them together and says once why they ended."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from megatron_paint.base.errors import UserError
from megatron_paint.config.settings import MegatronSettings
from megatron_paint.launch.exit_status import reason, stopped
from megatron_paint.launch.failure_notes import FOLDER, read_notes
from megatron_paint.runtime.processes import LAUNCHER
from megatron_paint.runtime.signals import NotedSignals
from megatron_paint.runtime.stop import STOPPED, STOPPING

ENDING = (signal.SIGINT, signal.SIGHUP, *STOPPING)
LOOK_SECONDS = 0.05
SETTLE_SECONDS = 0.5  # a rank that was killed may be seen after one that only lost its connection to it
GRACE_SECONDS = 5.0  # after another rank's failure: for what is begun on a disk to be taken back


def number_of_processes(megatron: MegatronSettings, asked: int | None) -> int:
    """`--processes`, or by default one a GPU; without GPUs as many as one replica of the model needs."""
    import torch

    gpus = torch.cuda.device_count()
    if asked is None:
        return gpus or megatron.tensor_model_parallel_size * megatron.pipeline_model_parallel_size
    if asked < 1:
        raise UserError(f"--processes must be at least 1, got {asked}")
    if gpus and asked > gpus:
        raise UserError(
            f"--processes={asked} is above the number of GPUs here, {gpus}, and each process drives one: give at most "
            f"{gpus}, or start ranks on several machines with torchrun or srun"
        )
    return asked


def run_here(arguments: Sequence[str], processes: int, *, prepare: Callable[[str], None] = lambda folder: None) -> int:
    """Runs `megatron-paint ARGUMENTS` in so many processes; the exit status of the run.

    0: all ended well; 2: an error of the user's; 1: a rank failed or was killed; 75: stopped early, with a checkpoint;
    128 + signal: the launcher was told to end. The first SIGTERM or SIGUSR1 is handed on to the ranks, which stop after
    their step; whatever comes after it ends them. prepare: puts into the folder that the ranks share with this process
    what they need of it. What the ranks met is printed once; no rank outlives this call.
    """
    from torch.distributed import TCPStore

    # The ranks meet at a store of the launcher's, as they do under torchrun: no port has to be guessed.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory(prefix="megatron_paint_") as notes, _EndingSignals() as told:
        ranks: list[subprocess.Popen] = []
        prepare(notes)
        try:
            for rank in range(processes):
                ranks.append(_start(arguments, _environment(rank, processes, store.port, notes)))
            _watch(ranks, told)
            exits = [rank.poll() for rank in ranks]
        finally:
            _end(ranks, grace=0.0 if told.asks_to_end else GRACE_SECONDS)
        message, status = reason(exits, read_notes(notes))
        if told.asks_to_end or (told.signal and status not in (0, STOPPED)):
            message, status = stopped(told.signal)
    if message:
        print(message, file=sys.stderr)
    return status


class _EndingSignals(NotedSignals):
    """What asks this process to end."""

    def __init__(self) -> None:
        super().__init__(ENDING)  # but those of nohup, or of a shell for what it runs behind: they are ignored

    @property
    def asks_to_stop(self) -> bool:
        """Whether all that came is one signal that lets a run stop in its own time."""
        return self.count == 1 and self.signal in STOPPING

    @property
    def asks_to_end(self) -> bool:
        return self.count > 0 and not self.asks_to_stop


def _environment(rank: int, processes: int, port: int, notes: str) -> dict[str, str]:
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    # Python clears up after a worker pool whose rank was ended, and would complain of having had to.
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
        FOLDER: notes,
    }
    return {"OMP_NUM_THREADS": threads} | os.environ | ours


def _start(arguments: Sequence[str], environment: dict[str, str]) -> subprocess.Popen:
    """One rank in a process group of its own: Ctrl-C reaches the launcher alone, and its workers end with it."""
    command = [sys.executable, "-m", "megatron_paint", *arguments]
    return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, process_group=0)


def _watch(ranks: Sequence[subprocess.Popen], told: _EndingSignals) -> None:
    """Returns when all ranks have ended, soon after one has failed, or when a signal asks for the end."""
    failed_at, handed_on = None, False
    while not told.asks_to_end and any(rank.poll() is None for rank in ranks):
        if told.asks_to_stop and not handed_on:
            handed_on = True
            for rank in ranks:
                with suppress(ProcessLookupError):
                    rank.send_signal(told.signal)
        if failed_at is None and any(rank.returncode not in (None, 0, STOPPED) for rank in ranks):
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() > failed_at + SETTLE_SECONDS:
            return
        time.sleep(LOOK_SECONDS)


def _end(ranks: Sequence[subprocess.Popen], *, grace: float) -> None:
    """Ends the ranks that are left, and every process that they started; grace: seconds to end by themselves."""
    for rank in ranks:
        if rank.poll() is None:
            _signal_group(rank, signal.SIGTERM)
    deadline = time.monotonic() + grace
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
        time.sleep(LOOK_SECONDS)
    for rank in ranks:
        _signal_group(rank, signal.SIGKILL)
        rank.wait()


def _signal_group(rank: subprocess.Popen, number: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(rank.pid, number)
