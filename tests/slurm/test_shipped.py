"""`megatron-paint launch slurm` on a real cluster: its runs reach the same weights, whatever happens."""

import re

import pytest

from tests.slurm.shipped import (
    CPUS,
    MINUTES,
    PROCESSES,
    ROOT,
    another_folder,
    check_is_undisturbed,
    ends,
    heartbeats,
    launch,
    launch_on,
    start_checkpoints,
    wait_for_checkpoint,
    wait_for_step,
)

READY_MADE = sorted((ROOT / "examples" / "slurm").glob("*.sbatch"))


def test_a_chain_of_which_the_first_job_finishes(cluster, undisturbed, tmp_path):
    first, second = launch(cluster, tmp_path / "run", "--attempts=2")
    first.wait("COMPLETED", seconds=MINUTES)
    second.wait("CANCELLED")
    check_is_undisturbed(tmp_path / "run", undisturbed)
    assert start_checkpoints(tmp_path / "run") == [0]
    assert "preflight: 2 nodes ok in" in first.output()


@pytest.mark.long
def test_a_run_of_one_task_a_rank(cluster, undisturbed, tmp_path):
    (job,) = launch(cluster, tmp_path / "run", launcher="srun")
    job.wait("COMPLETED", restarts=0, seconds=MINUTES)
    check_is_undisturbed(tmp_path / "run", undisturbed)


@pytest.mark.parametrize("script", READY_MADE, ids=[file.stem for file in READY_MADE])
def test_the_ready_made_scripts_are_accepted(cluster, script):
    """As they are; ACCOUNT is not checked here, and PARTITION and most nodes are those of the cluster."""
    asked = int(re.search(r"^#SBATCH --nodes=(\d+)$", script.read_text(), re.MULTILINE)[1])
    nodes = min(asked, len(cluster.names))
    done = cluster.run(["sbatch", "--test-only", "--partition=debug", f"--nodes={nodes}", script], cwd=ROOT)
    assert "to start at" in done.stderr


@pytest.mark.long
def test_whole_nodes_with_their_gpus(cluster, undisturbed, tmp_path):
    """The #SBATCH lines of the defaults; the ranks run on CPUs, which the preflight would object to."""
    (job,) = launch_on(cluster, tmp_path / "run", "--nodes=2", PROCESSES, "--no-preflight")
    job.wait("COMPLETED", restarts=0, seconds=MINUTES)
    check_is_undisturbed(tmp_path / "run", undisturbed)


@pytest.mark.long
def test_four_nodes_and_two_replicas(cluster, on_one_machine, tmp_path):
    """TP 2 x PP 2 x DP 2."""
    run, steps = tmp_path / "run", 4
    one = on_one_machine(8, f"run.steps={steps}")
    options = ("--nodes=4", "--gpus-per-node=0", PROCESSES, "--mem=64G", CPUS["torchrun"], f"run.steps={steps}")
    (job,) = launch_on(cluster, run, *options)
    job.wait("COMPLETED", restarts=0, seconds=MINUTES)
    assert job.nodes() == ["n1", "n2", "n3", "n4"]
    check_is_undisturbed(run, one, steps=steps)


@pytest.mark.parametrize("launcher", [pytest.param("torchrun", marks=pytest.mark.long), "srun"])
def test_a_signal_stops_the_run_and_requeues_it(cluster, undisturbed, tmp_path, launcher):
    """What --signal does before the time limit."""
    run = tmp_path / "run"
    (job,) = launch(cluster, run, launcher=launcher)
    wait_for_step(job, run, 4)
    job.signal("USR1")
    job.wait("COMPLETED", restarts=1, seconds=MINUTES)
    first, second = start_checkpoints(run)
    assert first == 0
    assert second >= 4
    assert f"Stopped after step {second} by SIGUSR1" in job.output()
    check_is_undisturbed(run, undisturbed)


@pytest.mark.parametrize("place", ["worker", pytest.param("head", marks=pytest.mark.long)])
def test_a_node_crashes(cluster, undisturbed, tmp_path, place):
    run = tmp_path / "run"
    (job,) = launch(cluster, run)
    wait_for_step(job, run, 4)
    wait_for_checkpoint(job, run, 3)
    crashed = job.nodes()[place == "worker"]
    cluster.crash(crashed)
    job.wait("COMPLETED", restarts=1, seconds=MINUTES)
    assert crashed not in job.nodes()
    assert start_checkpoints(run)[0] == 0
    assert start_checkpoints(run)[-1] >= 3
    check_is_undisturbed(run, undisturbed)


@pytest.mark.long
def test_a_killed_rank_is_started_again_within_the_job(cluster, undisturbed, tmp_path):
    run = tmp_path / "run"
    (job,) = launch(cluster, run)
    wait_for_step(job, run, 4)
    heartbeat = heartbeats(run)[1]
    cluster.run(["kill", "-KILL", str(heartbeat["pid"])], on=heartbeat["host"])
    job.wait("COMPLETED", restarts=0, seconds=MINUTES)
    assert start_checkpoints(run) == [0]
    check_is_undisturbed(run, undisturbed)


@pytest.mark.long
def test_a_node_that_the_preflight_names_is_left_out(cluster, undisturbed, tmp_path):
    """n2 has another folder in the run's place; the job avoids it from then on, and n4 as before."""
    run = tmp_path / "run"
    with another_folder(cluster, run, "n2"):
        (job,) = launch(cluster, run, "--exclude=n4")
        job.wait("COMPLETED", restarts=1, seconds=MINUTES)
    assert f"preflight: node n2: shared folder: {run} does not contain what n1 wrote into it" in job.output()
    assert f"job {job.id} avoids nodes: n2\n" in job.output()
    assert ends(run) == [3, 0]
    assert job.nodes() == ["n1", "n3"]
    check_is_undisturbed(run, undisturbed)


def test_a_chain_leaves_out_a_node_that_the_preflight_names(cluster, undisturbed, tmp_path):
    run = tmp_path / "run"
    with another_folder(cluster, run, "n2"):
        first, second, third = launch(cluster, run, "--attempts=3")
        first.wait("COMPLETED", seconds=MINUTES)
        second.wait("COMPLETED", seconds=MINUTES)
    third.wait("CANCELLED")
    assert first.nodes() == ["n1", "n2"]
    assert "n2" not in second.nodes()
    for job in (second, third):
        assert "ExcNodeList=n2 " in cluster.query(["scontrol", "show", "job", "--oneliner", str(job.id)])
    assert ends(run) == [3, 0]
    check_is_undisturbed(run, undisturbed)
