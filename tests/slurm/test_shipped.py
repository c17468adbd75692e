"""`megatron-paint launch slurm` on a real cluster: what it submits trains to the same weights, whatever happens."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_paint.run.folder import RunFolder
from tests.slurm.job import Job
from tests.slurm.until import until

ROOT = Path(__file__).parents[2]
MINUTES = 900.0  # processes import torch at once, on a machine with few cores, and again after a requeue
STEPS = 24
SETTINGS = ("examples/quickstart/paint.yaml", f"run.steps={STEPS}", "run.save_every=3", "evaluation.problems=null")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
NODES = ("--nodes=2", "--gpus-per-node=0", "--processes-per-node=2", "--mem=64G")
CPUS = {"torchrun": "--cpus-per-task=24", "srun": "--cpus-per-task=12"}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """The same run in one piece on one machine."""
    run = tmp_path_factory.mktemp("one") / "run"
    command = [sys.executable, "-m", "megatron_paint", "train", *SETTINGS, f"run.dir={run}", "--processes", "4"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=MINUTES
    )
    assert done.returncode == 0, done.stderr
    return run


def launch(cluster, run: Path, *options: str, launcher: str = "torchrun") -> list[Job]:
    """The submitted jobs."""
    command = [sys.executable, "-m", "megatron_paint", "launch", "slurm", *SETTINGS, f"run.dir={run}", *NODES]
    command += [f"--launcher={launcher}", CPUS[launcher], "--env=PYTHONPATH", "--env=OMP_NUM_THREADS", *options]
    done = cluster.run(command, cwd=ROOT, env=ENVIRONMENT, seconds=MINUTES)
    (submitted,) = re.findall(r"^submitted +(.*); console", done.stdout, re.MULTILINE)
    return [Job(cluster, int(number)) for number in submitted.split(", ")]


def wait_for_step(job: Job, run: Path, step: int) -> None:
    def reached() -> bool:
        assert job.state() in ("PENDING", "CONFIGURING", "RUNNING"), job.describe()
        return len(RunFolder(run).read_metrics()) >= step

    until(reached, seconds=MINUTES, otherwise=job.describe)


def weights(run: Path) -> dict[str, torch.Tensor]:
    files = (run / "hf" / f"step_{STEPS:06d}").glob("*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def check_is_undisturbed(run: Path, undisturbed: Path) -> None:
    """The same weights to the bit, each step once, and the run folder says that it is done."""
    ours, theirs = weights(run), weights(undisturbed)
    assert len(theirs) > 20
    assert ours.keys() == theirs.keys()
    assert [key for key in theirs if not torch.equal(ours[key], theirs[key])] == []
    assert [line["step"] for line in RunFolder(run).read_metrics()] == list(range(1, STEPS + 1))
    assert RunFolder(run).read_links()[-1]["decision"] == "done"


def lives(run: Path) -> list[int]:
    """The newest checkpoint at each beginning of a link."""
    return [record["checkpoint"] for record in RunFolder(run).read_links() if record["event"] == "begin"]


def test_a_chain_of_which_the_first_link_finishes(cluster, undisturbed, tmp_path):
    first, second = launch(cluster, tmp_path / "run", "--links=2")
    first.wait("COMPLETED", seconds=MINUTES)
    second.wait("CANCELLED")
    check_is_undisturbed(tmp_path / "run", undisturbed)
    assert lives(tmp_path / "run") == [0]
    assert "preflight: 2 nodes ok in" in first.output()


@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_a_signal_stops_the_run_and_requeues_it(cluster, undisturbed, tmp_path, launcher):
    """What --signal does before the time limit."""
    run = tmp_path / "run"
    (job,) = launch(cluster, run, launcher=launcher)
    wait_for_step(job, run, 4)
    job.signal("USR1")
    job.wait("COMPLETED", restarts=1, seconds=MINUTES)
    first, second = lives(run)
    assert first == 0
    assert second >= 4
    assert f"Stopped after step {second} by SIGUSR1" in job.output()
    check_is_undisturbed(run, undisturbed)


@pytest.mark.parametrize("place", ["worker", "head"])
def test_a_node_crashes(cluster, undisturbed, tmp_path, place):
    run = tmp_path / "run"
    (job,) = launch(cluster, run)
    wait_for_step(job, run, 4)
    crashed = job.nodes()[place == "worker"]
    cluster.crash(crashed)
    job.wait("COMPLETED", restarts=1, seconds=MINUTES)
    assert crashed not in job.nodes()
    assert lives(run)[0] == 0
    assert lives(run)[-1] >= 3
    check_is_undisturbed(run, undisturbed)


def test_a_killed_rank_is_started_again_within_the_job(cluster, undisturbed, tmp_path):
    run = tmp_path / "run"
    (job,) = launch(cluster, run)
    wait_for_step(job, run, 4)
    beat = json.loads((run / "logs" / "heartbeats" / "rank_00001.json").read_text())
    cluster.run(["kill", "-KILL", str(beat["pid"])], on=beat["host"])
    job.wait("COMPLETED", restarts=0, seconds=MINUTES)
    assert lives(run) == [0]
    check_is_undisturbed(run, undisturbed)


@contextmanager
def another_folder(cluster, run: Path, node: str) -> Iterator[None]:
    """Inside, a node sees another folder in the run's place."""
    run.mkdir()
    cluster.run(["mount", "-t", "tmpfs", "other", run], on=node)
    try:
        yield
    finally:
        cluster.run(["umount", run], on=node)


def test_a_node_that_the_preflight_names_is_left_out(cluster, undisturbed, tmp_path):
    """n2 has another folder in the run's place; the job stays off it from then on, and off n4 as it did before."""
    run = tmp_path / "run"
    with another_folder(cluster, run, "n2"):
        (job,) = launch(cluster, run, "--exclude=n4")
        job.wait("COMPLETED", restarts=1, seconds=MINUTES)
    assert f"preflight: node n2: shared folder: {run} does not show what n1 wrote into it" in job.output()
    assert f"job {job.id} stays off nodes: n2\n" in job.output()
    assert [record["status"] for record in RunFolder(run).read_links() if record["event"] == "end"] == [3, 0]
    assert job.nodes() == ["n1", "n3"]
    check_is_undisturbed(run, undisturbed)


def test_a_chain_leaves_out_a_node_that_the_preflight_names(cluster, undisturbed, tmp_path):
    run = tmp_path / "run"
    with another_folder(cluster, run, "n2"):
        first, second, third = launch(cluster, run, "--links=3")
        first.wait("COMPLETED", seconds=MINUTES)
        second.wait("COMPLETED", seconds=MINUTES)
    third.wait("CANCELLED")
    assert first.nodes() == ["n1", "n2"]
    assert "n2" not in second.nodes()
    for job in (second, third):
        assert "ExcNodeList=n2 " in cluster.run(["scontrol", "show", "job", "--oneliner", str(job.id)]).stdout
    assert [record["status"] for record in RunFolder(run).read_links() if record["event"] == "end"] == [3, 0]
    check_is_undisturbed(run, undisturbed)
