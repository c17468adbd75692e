"""A trial's training run: its folder, its process, and what its run folder holds of it."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from megatron_paint.config.saved import to_yaml
from megatron_paint.run.folder import RunFolder
from megatron_paint.runtime.files import disk_errors, write_atomically
from megatron_paint.runtime.processes import SEARCH
from megatron_paint.search.space import Space, Value, trial_tree

TRIALS = "trials"
LOG = "logs/search.out"  # in the run folder: what the run prints
TAIL = 1 << 16  # bytes of the log that are searched for the reason of a failure
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a trial trains: one of several places of this machine."""

    processes: int | None  # ranks; None: what `train` starts
    gpus: tuple[str, ...] = ()  # for CUDA_VISIBLE_DEVICES; empty: not changed
    threads: int = 1  # of a rank on the CPU

    @property
    def options(self) -> list[str]:
        """Options of `train` and `evaluate`."""
        return [] if self.processes is None else ["--processes", str(self.processes)]

    def environment(self, environ: Mapping[str, str]) -> dict[str, str]:
        """The variables of the trial's process, which is no rank of a launcher of this one."""
        plain = {name: value for name, value in environ.items() if name not in RANK_VARIABLES}
        gpus = {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus)} if self.gpus else {}
        return {"OMP_NUM_THREADS": str(self.threads)} | plain | gpus | {SEARCH: str(os.getpid())}


@dataclass(kw_only=True)
class TrialRun:
    """One trial in its run folder OUT/trials/0007, which `train` also continues by hand."""

    out: Path
    number: int
    place: Place
    process: "subprocess.Popen | None" = field(default=None, repr=False)

    @property
    def path(self) -> Path:
        return trial_folder(self.out, self.number)

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.path)

    @property
    def settings_file(self) -> Path:
        """The settings that `train` is started with. config.yaml of the run folder has the same."""
        return self.path / "logs" / "settings.yaml"

    @property
    def command(self) -> list[str]:
        """The arguments of `megatron-paint`."""
        return ["train", str(self.settings_file), *self.place.options]

    def write_settings(self, space: Space, chosen: Mapping[str, Value]) -> None:
        """Writes the settings file. UserError: the chosen values contradict each other; the disk refuses."""
        text = to_yaml(trial_tree(space, chosen, run_dir=str(self.path)))
        write_atomically(self.settings_file, f"# Trial {self.number} of a search.\n{text}")

    def start(self) -> None:
        """Starts `train`. It ends at once if this process dies."""
        self.process = start_process(self.command, self.place, self.path / LOG)

    def stop(self) -> None:
        """Asks the run to stop after its step, with a checkpoint. The launcher passes the signal to its ranks."""
        with suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGUSR1)  # it ignores SIGTERM: see `end_with_launcher`

    def kill(self) -> None:
        """Ends the run at once, if it was started. Its ranks end with their launcher."""
        if self.process is None:
            return
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def accuracies(self, budget_steps: int, *, without: Collection[int] = ()) -> dict[int, float]:
        """Avg@n of the evaluations so far by step, in ascending order.

        Step 0 is left out, because all trials share it. without: further steps to leave out.
        """
        steps = [step for step in self.folder.evaluated_steps() if 0 < step <= budget_steps and step not in without]
        return {step: self.folder.read_eval(step).metrics["avg"] for step in steps}

    def reason(self) -> str:
        """Why its run failed."""
        return last_error(self.path / LOG)


def start_process(arguments: Sequence[str], place: Place, log: Path) -> subprocess.Popen:
    """Starts `megatron-paint ARGUMENTS` in a separate process group. It ends at once if this process dies.

    log: gets what it prints, after what is there. UserError: the disk refuses.
    """
    with disk_errors(log), open(log, "ab") as stream:
        return subprocess.Popen(
            [sys.executable, "-m", "megatron_paint", *arguments],
            env=place.environment(os.environ),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            process_group=0,
        )


def last_error(log: Path) -> str:
    """The last error in the log of a command, or its last line."""
    try:
        with open(log, "rb") as stream:
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - TAIL))
            lines = stream.read().decode("utf-8", "replace").splitlines()
    except OSError as error:
        return f"no log: {error}"
    lines = [line.strip() for line in lines if line.strip()]
    errors = [line for line in lines if line.startswith("megatron-paint: ")]
    return (errors or lines or ["it printed nothing"])[-1]


def trial_folder(out: Path, number: int) -> Path:
    """The run folder of a trial."""
    return out / TRIALS / f"{number:04d}"


def remove_weights(run: Path) -> None:
    """Removes checkpoints and export of a run. Metrics, samples and evaluations stay."""
    for name in ("checkpoints", "hf"):
        shutil.rmtree(run / name, ignore_errors=True)


def places(*, jobs: int, processes: int | None, gpus: Sequence[str], cores: int, ranks: int) -> list[Place]:
    """The places of so many trials side by side.

    gpus: those of this machine, which are divided; processes: ranks of a trial, None: one for each of its GPUs, else
    `ranks`. cores: of this machine, divided among all ranks.
    """
    share = len(gpus) // jobs
    found = []
    for job in range(jobs):
        own = tuple(gpus[job * share : (job + 1) * share])
        count = processes if processes is not None else (len(own) or ranks)
        found.append(Place(processes=count, gpus=own, threads=max(1, cores // (jobs * count))))
    return found
