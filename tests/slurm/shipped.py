"""Runs that `megatron-paint launch slurm` submits to the cluster, and the checks that every run must pass."""

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from megatron_paint.run.folder import RunFolder
from tests.slurm.cluster import Cluster
from tests.slurm.configuration import LOGIN
from tests.slurm.job import Job
from tests.support.until import until

ROOT = Path(__file__).parents[2]
MINUTES = 900.0  # processes import torch at once, on a machine with few cores, and again after a requeue
STEPS = 24
SETTINGS = (
    *("examples/quickstart/paint.yaml", f"run.steps={STEPS}", "run.save_every=3", "evaluation.problems=null"),
    *("data.problems_per_step=8", "rollout.max_new_tokens=24"),
)
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
PROCESSES = "--processes-per-node=2"
NODES = ("--nodes=2", "--gpus-per-node=0", PROCESSES, "--mem=64G")
CPUS = {"torchrun": "--cpus-per-task=24", "srun": "--cpus-per-task=12"}
STEP_LINE = re.compile(r"\bstep +(\d+)/\d+ ")


def launch(cluster: Cluster, run: Path, *options: str, launcher: str = "torchrun", on: str = LOGIN) -> list[Job]:
    """The jobs of a run on two nodes that share their machine with others."""
    return launch_on(cluster, run, *NODES, f"--launcher={launcher}", CPUS[launcher], *options, on=on)


def launch_on(cluster: Cluster, run: Path, *options: str, on: str = LOGIN) -> list[Job]:
    """The submitted jobs. options: arguments of the command in addition to the settings. on: the host that launches."""
    command = [sys.executable, "-m", "megatron_paint", "launch", "slurm", *SETTINGS, f"run.dir={run}"]
    command += ["--env=PYTHONPATH", "--env=OMP_NUM_THREADS", *options]
    done = cluster.run(command, cwd=ROOT, env=ENVIRONMENT, seconds=MINUTES, on=on)
    (submitted,) = re.findall(r"^submitted +(.*); console", done.stdout, re.MULTILINE)
    return [Job(cluster, int(number)) for number in submitted.split(", ")]


def wait_for_step(job: Job, run: Path, step: int) -> None:
    """Returns when the run has done a step."""

    def reached() -> bool:
        assert not job.has_ended(), job.describe()
        return len(RunFolder(run).read_metrics()) >= step

    until(reached, seconds=MINUTES, otherwise=job.describe)


def wait_for_checkpoint(job: Job, run: Path, step: int) -> None:
    """Returns when the checkpoint of this or a later step is complete, which is some time after the step."""

    def reached() -> bool:
        assert not job.has_ended(), job.describe()
        return (RunFolder(run).latest_checkpoint() or 0) >= step

    until(reached, seconds=MINUTES, otherwise=job.describe)


def heartbeats(run: Path) -> list[dict[str, Any]]:
    """The last heartbeat of each rank, by rank: host, pid, step, ..."""
    files = sorted((run / "logs" / "heartbeats").glob("rank_*.json"))
    return [json.loads(file.read_text()) for file in files]


def weights(run: Path) -> dict[str, torch.Tensor]:
    (exported,) = (run / "hf").iterdir()
    return {name: tensor for file in exported.glob("*.safetensors") for name, tensor in load_file(file).items()}


def check_is_undisturbed(run: Path, undisturbed: Path, *, steps: int = STEPS) -> None:
    """Bitwise the same weights, each step once, and the run folder records that the run is done."""
    print(describe_attempts(run))
    ours, theirs = weights(run), weights(undisturbed)
    assert len(theirs) > 20
    assert ours.keys() == theirs.keys()
    assert [key for key in theirs if not torch.equal(ours[key], theirs[key])] == []
    assert [line["step"] for line in RunFolder(run).read_metrics()] == list(range(1, steps + 1))
    assert RunFolder(run).read_attempts()[-1]["decision"] == "done"


def start_checkpoints(run: Path) -> list[int]:
    """The newest checkpoint at the beginning of each attempt."""
    return [record["checkpoint"] for record in RunFolder(run).read_attempts() if record["event"] == "begin"]


def ends(run: Path) -> list[int]:
    """The exit status of each attempt that recorded its end."""
    return [record["status"] for record in RunFolder(run).read_attempts() if record["event"] == "end"]


def describe_attempts(run: Path) -> str:
    """Steps done twice, and when each attempt began and ended, in seconds after the first one began.

    The last attempt that does a step writes the samples of the step again.
    """
    folder = RunFolder(run)
    files = [*folder.logs.glob("*/node_*/*/attempt_*/*/stdout.log"), *folder.logs.glob("*/rank_0.log")]
    printed = [step for file in files for step in STEP_LINE.findall(file.read_text())]
    records = [record for record in folder.read_attempts() if record["event"] != "launch"]
    times = [datetime.fromisoformat(record["time"]).timestamp() for record in records]
    lines = [f"steps done twice: {len(printed) - len(set(printed))}"]
    for record, time in zip(records, times, strict=True):
        checkpoint = record["checkpoint"]
        line = f"{time - times[0]:4.0f} s  {record['event']} on {record['nodes']}, checkpoint {checkpoint}"
        if record["event"] == "end":
            line += f", status {record['status']}: {record['decision']}"
        else:
            for step, what in ((checkpoint, "since that step"), (checkpoint + 1, "to its next step")):
                if (samples := folder.samples_file(step)).exists():
                    line += f", {abs(samples.stat().st_mtime - time):.0f} s {what}"
        lines.append(line)
    return "\n".join(lines)


@contextmanager
def another_folder(cluster: Cluster, run: Path, *nodes: str) -> Iterator[None]:
    """In the `with` block these nodes see another folder instead of the run folder."""
    run.mkdir()
    for node in nodes:
        cluster.run(["mount", "-t", "tmpfs", "other", run], on=node)
    try:
        yield
    finally:
        for node in nodes:
            cluster.run(["umount", run], on=node)
