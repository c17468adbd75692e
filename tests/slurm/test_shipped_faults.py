"""Faults that the shipped batch script survives on a real cluster: the run ends with the weights of one undisturbed."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_paint.run.folder import STOPPED, RunFolder
from tests.slurm.cluster import Cluster
from tests.slurm.shipped import (
    MINUTES,
    ROOT,
    check_is_undisturbed,
    ends,
    heartbeats,
    launch,
    start_checkpoints,
    wait_for_checkpoint,
    wait_for_step,
)
from tests.support.until import until

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]

DISK = 80_000_000  # bytes: all checkpoints of a run, of 6 MB each
LEFT = 4_000_000  # less than a checkpoint
COUNTER = "megatron_paint/launch/preflight/gpus.py"


@pytest.mark.parametrize("place", ["worker", "head"])
def test_a_node_off_the_network_for_a_while(cluster, undisturbed, tmp_path, place):
    """Slurm takes it for dead and starts the job on other nodes; when it is back, what still runs there is ended."""
    run = tmp_path / "run"
    (job,) = launch(cluster, run)
    wait_for_step(job, run, 4)
    wait_for_checkpoint(job, run, 3)
    cut = job.nodes()[place == "worker"]
    cluster.cut(cut)
    job.wait("RUNNING", restarts=1, seconds=MINUTES)
    assert cut not in job.nodes()
    wait_for_step(job, run, 8)
    cluster.mend(cut)
    cluster.wait_nodes("idle", cut)
    job.wait("COMPLETED", restarts=1, seconds=MINUTES)
    assert start_checkpoints(run)[0] == 0
    assert start_checkpoints(run)[-1] >= 3
    check_is_undisturbed(run, undisturbed)


def test_the_controller_is_away_while_the_run_trains(cluster, undisturbed, tmp_path):
    run = tmp_path / "run"
    (job,) = launch(cluster, run)
    wait_for_step(job, run, 4)
    cluster.stop_controller()
    wait_for_step(job, run, 12)
    cluster.start_controller()
    job.wait("COMPLETED", restarts=0, seconds=MINUTES)
    assert start_checkpoints(run) == [0]
    check_is_undisturbed(run, undisturbed)


def test_the_controller_is_away_when_a_job_requeues_itself(cluster, undisturbed, tmp_path):
    run = tmp_path / "run"
    (job,) = launch(cluster, run)
    wait_for_step(job, run, 4)
    head = job.nodes()[0]
    cluster.stop_controller()
    script = cluster.run(["pgrep", "--oldest", "--full", "slurm_script"], on=head).stdout.strip()
    cluster.run(["kill", "-USR1", script], on=head)
    console = run / "logs" / f"{job.id}.out"
    until(
        lambda: "Unable to contact slurm controller" in console.read_text(),
        seconds=MINUTES,
        otherwise=console.read_text,
    )
    assert ends(run) == [0]
    cluster.start_controller()
    job.wait("COMPLETED", restarts=1, seconds=MINUTES)
    check_is_undisturbed(run, undisturbed)


@pytest.fixture
def small_disk(cluster, tmp_path) -> Iterator[Path]:
    """A disk that n1 and n2 have in common: machines see what was mounted before they were booted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "disk", disk], check=True)
    try:
        for node in ("n1", "n2"):
            cluster.crash(node)
            cluster.start(node)
        cluster.wait_nodes("idle")
        yield disk
        for node in ("n1", "n2"):
            cluster.run(["umount", "--lazy", disk], on=node)
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_the_disk_is_full_at_a_save(cluster, undisturbed, small_disk, launcher):
    """The run stops and reports where space is missing. Launched again, with free space, it resumes.

    With torchrun, whose exit status says little, it is the preflight of the next two starts that finds it.
    """
    run, options = small_disk / "run", ["--sbatch=--nodelist=n1,n2"]
    (job,) = launch(cluster, run, *options, launcher=launcher, on="n1")
    wait_for_step(job, run, 4)
    wait_for_checkpoint(job, run, 3)
    ballast = small_disk / "ballast"
    with ballast.open("wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, shutil.disk_usage(small_disk).free - LEFT)
    job.wait("FAILED", seconds=MINUTES)
    kept = RunFolder(run).latest_checkpoint()
    refused = f"megatron-paint: error: Cannot write {RunFolder(run).checkpoint_folder(kept + 3)}: "
    assert refused in job.output(), job.output()
    assert {"torchrun": "space: 0.0 GB free at", "srun": "or a full disk; see the log"}[launcher] in job.output()
    assert (run / STOPPED).exists()
    assert not list((run / "checkpoints").glob(".*"))
    ballast.unlink()
    (job,) = launch(cluster, run, *options, launcher=launcher, on="n1")
    job.wait("COMPLETED", seconds=MINUTES)
    assert start_checkpoints(run)[-1] == kept
    check_is_undisturbed(run, undisturbed)


def test_a_checkpoint_is_damaged_between_two_jobs(cluster, undisturbed, tmp_path):
    run = tmp_path / "run"
    first, second = launch(cluster, run, "--attempts=2")
    second.hold()
    wait_for_step(first, run, 7)
    first.signal("USR1")
    first.wait("COMPLETED", seconds=MINUTES)
    newest = RunFolder(run).checkpoint_folder(RunFolder(run).latest_checkpoint())
    cut = max(newest.glob("*.distcp"), key=lambda file: file.stat().st_size)
    os.truncate(cut, cut.stat().st_size // 2)
    *_, older, _ = RunFolder(run).checkpoints()
    second.release()
    second.wait("COMPLETED", seconds=MINUTES)
    assert f"warning: checkpoint {newest} is damaged: {cut.name}" in second.output()
    assert f"resumed at step {older} from " in second.output()
    assert newest.with_name(f"damaged_1_{newest.name}").is_dir()
    check_is_undisturbed(run, undisturbed)


@contextmanager
def holding(cluster: Cluster, run: Path, rank: int) -> Iterator[dict]:
    """In the `with` block a rank is held, so all ranks wait for it. Yields its host and pid."""
    beat = heartbeats(run)[rank]
    program = [sys.executable, ROOT / "tests/slurm/hold.py", str(beat["pid"])]
    with cluster.start_program(program, on=beat["host"]) as holder:
        assert holder.stdout.readline() == "held\n"
        yield beat


def test_slurm_itself_signals_before_the_time_limit(cluster, undisturbed, tmp_path):
    run = tmp_path / "run"
    (job,) = launch(cluster, run, "--time=60", "--signal-seconds=1200", "run.exit_before_limit_s=0")
    wait_for_step(job, run, 4)
    with holding(cluster, run, rank=3) as beat:
        job.set_time_limit(10)
        usr1 = 1 << (signal.SIGUSR1 - 1)

        def signalled() -> bool:
            status = cluster.run(["cat", f"/proc/{beat['pid']}/status"], on=beat["host"]).stdout
            (pending,) = [line.split()[1] for line in status.splitlines() if line.startswith("ShdPnd:")]
            return bool(int(pending, 16) & usr1)

        until(signalled, seconds=MINUTES, otherwise=job.describe)
        job.set_time_limit(60)
    job.wait("COMPLETED", restarts=1, seconds=MINUTES)
    assert f"Stopped after step {start_checkpoints(run)[1]} by SIGUSR1" in job.output()
    check_is_undisturbed(run, undisturbed)


def test_the_time_limit_leaves_no_time_for_a_checkpoint(cluster, undisturbed, tmp_path):
    run = tmp_path / "run"
    first, second = launch(cluster, run, "--time=60", "--attempts=2")
    wait_for_step(first, run, 4)
    with holding(cluster, run, rank=3):
        first.set_time_limit(1)
        first.wait("TIMEOUT", seconds=MINUTES)
    second.wait("COMPLETED", seconds=MINUTES)
    assert len(ends(run)) == 1  # the first was killed before it could record its own
    assert start_checkpoints(run)[1] % 3 == 0
    check_is_undisturbed(run, undisturbed)


def test_a_job_is_cancelled_and_launched_again(cluster, undisturbed, tmp_path):
    """By TERM to its script, and by scancel. Neither brings the job back."""
    run = tmp_path / "run"
    (job,) = launch(cluster, run)
    wait_for_step(job, run, 4)
    job.signal("TERM")
    job.wait("FAILED", restarts=0, seconds=MINUTES)
    assert job.exit_code() == 143
    saved = RunFolder(run).latest_checkpoint()
    assert f"Stopped after step {saved} by SIGUSR1" in job.output()
    (job,) = launch(cluster, run)
    wait_for_checkpoint(job, run, saved + 1)
    job.cancel()
    job.wait("CANCELLED", restarts=0, seconds=MINUTES)
    (job,) = launch(cluster, run)
    job.wait("COMPLETED", restarts=0, seconds=MINUTES)
    assert start_checkpoints(run)[:2] == [0, saved]
    assert start_checkpoints(run)[2] > saved
    check_is_undisturbed(run, undisturbed)


def test_a_job_is_requeued_from_outside(cluster, undisturbed, tmp_path):
    run = tmp_path / "run"
    (job,) = launch(cluster, run)
    wait_for_step(job, run, 4)
    wait_for_checkpoint(job, run, 3)
    job.requeue()
    job.wait("COMPLETED", restarts=1, seconds=MINUTES)
    assert start_checkpoints(run)[1] >= 3
    check_is_undisturbed(run, undisturbed)


@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_a_job_is_preempted_with_time_to_save(cluster, undisturbed, tmp_path, launcher):
    """Slurm sends TERM to the ranks alone, and would take a job that then ends for failed or done."""
    run = tmp_path / "run"
    (job,) = launch(cluster, run, "--partition=lent", launcher=launcher)
    wait_for_step(job, run, 4)
    nodes = ",".join(job.nodes())
    urgent = cluster.submit("#!/bin/bash\nsleep 1000", "--partition=urgent", "--exclusive", f"--nodelist={nodes}")
    urgent.wait("RUNNING", seconds=MINUTES)
    job.wait("COMPLETED", restarts=1, seconds=MINUTES)
    assert start_checkpoints(run)[1] >= 4
    assert f"Stopped after step {start_checkpoints(run)[1]} by SIGTERM" in job.output()
    check_is_undisturbed(run, undisturbed)


def test_a_run_that_is_launched_again_while_it_trains(cluster, undisturbed, tmp_path):
    """The later job waits, and resumes the run when the earlier one is stopped."""
    run = tmp_path / "run"
    first, second = (launch(cluster, run, launcher="srun")[0] for _ in range(2))
    wait_for_step(first, run, 4)
    assert (second.state(), second.reason()) == ("PENDING", "Dependency")
    first.signal("USR1")
    first.wait("COMPLETED", restarts=0, seconds=MINUTES)
    second.wait("COMPLETED", restarts=0, seconds=MINUTES)
    assert start_checkpoints(run)[1] >= 4
    check_is_undisturbed(run, undisturbed)


@contextmanager
def miscounting(cluster: Cluster, tmp_path: Path, *nodes: str) -> Iterator[None]:
    """In the `with` block these nodes count one GPU, but the job expects none."""
    counter = tmp_path / "gpus.py"
    counter.write_text((ROOT / COUNTER).read_text() + "\n\ndef visible() -> int:\n    return 1\n")
    for node in nodes:
        cluster.run(["mount", "--bind", counter, ROOT / COUNTER], on=node)
    try:
        yield
    finally:
        for node in nodes:
            cluster.run(["umount", ROOT / COUNTER], on=node)


def named_by_preflight(node: str) -> str:
    return f"preflight: node {node}: GPUs: 1 visible, 0 expected; "


def test_the_first_node_has_another_number_of_gpus(cluster, undisturbed, tmp_path):
    run = tmp_path / "run"
    with miscounting(cluster, tmp_path, "n1"):
        (job,) = launch(cluster, run)
        job.wait("COMPLETED", restarts=1, seconds=MINUTES)
    assert named_by_preflight("n1") in job.output()
    assert ends(run) == [3, 0]
    assert job.nodes() == ["n2", "n3"]
    check_is_undisturbed(run, undisturbed)


def test_two_bad_nodes_one_after_the_other(cluster, undisturbed, tmp_path):
    run = tmp_path / "run"
    with miscounting(cluster, tmp_path, "n2", "n3"):
        (job,) = launch(cluster, run)
        job.wait("COMPLETED", restarts=2, seconds=MINUTES)
    for node in ("n2", "n3"):
        assert named_by_preflight(node) in job.output()
    assert ends(run) == [3, 3, 0]
    assert job.nodes() == ["n1", "n4"]
    check_is_undisturbed(run, undisturbed)
