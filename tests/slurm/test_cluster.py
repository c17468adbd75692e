"""The cluster that the other tests use: separate machines with the real behaviour of Slurm."""

import sys

import pytest

from tests.support.until import until

# Waits for a file, and prints on which node. The job ends only after the file exists.
HOLD = "echo holding on $(hostname); until [ -e {go} ]; do sleep 0.2; done"

LISTEN = """
import os, socket, sys, time
kept = socket.create_server(("0.0.0.0", 29500))
print("bound", flush=True)
while not os.path.exists(sys.argv[1]):
    time.sleep(0.2)
"""


@pytest.fixture(scope="module")
def limited(shared_cluster):
    """A job beyond its time limit, which Slurm enforces up to 30 s late: it runs while the other tests do."""
    script = "#!/bin/bash\ntrap 'echo told to end' TERM\nsleep 1000 &\nwait\nsleep 1000"
    job = shared_cluster.submit(script, "--time=1", "--nodelist=n4", "--exclusive", "--no-requeue")
    shared_cluster.keep(job)
    return job


@pytest.fixture(autouse=True)
def _time_runs(limited):
    """Starts the slowest job before the first test."""


def batch(*lines):
    return "\n".join(("#!/bin/bash", *lines, ""))


def test_a_node_has_its_own_name_and_address(cluster):
    job = cluster.submit(batch("srun --label bash -c 'hostname; hostname -i'"), "--nodelist=n1,n2")
    job.wait("COMPLETED")
    assert sorted(job.output().splitlines()) == ["0: 10.77.0.11", "0: n1", "1: 10.77.0.12", "1: n2"]
    assert job.nodes() == ["n1", "n2"]


def test_two_nodes_bind_the_same_port(cluster, tmp_path):
    (tmp_path / "listen.py").write_text(LISTEN)
    job = cluster.submit(batch(f"srun {sys.executable} {tmp_path}/listen.py {tmp_path}/go"), "--nodes=2")
    job.wait_output("bound\nbound\n")
    (tmp_path / "go").touch()
    job.wait("COMPLETED")


def test_shared_memory_is_a_nodes_own(cluster):
    write = "echo $SLURMD_NODENAME > /dev/shm/name; sleep 1; cat /dev/shm/name"
    job = cluster.submit(batch(f"srun --label bash -c '{write}'"), "--nodelist=n1,n2")
    job.wait("COMPLETED")
    assert sorted(job.output().splitlines()) == ["0: n1", "1: n2"]


def test_a_job_of_a_real_size_gets_its_gpus(cluster):
    script = batch(
        "#SBATCH --nodes=2 --gpus-per-node=8 --cpus-per-task=12 --mem=1500G",
        "srun bash -c 'echo $SLURM_CPUS_ON_NODE $SLURM_MEM_PER_NODE $CUDA_VISIBLE_DEVICES'",
    )
    job = cluster.submit(script)
    job.wait("COMPLETED")
    assert job.output().splitlines() == [f"12 {1500 * 1024} 0,1,2,3,4,5,6,7"] * 2


def test_two_jobs_on_a_node_get_different_gpus(cluster, tmp_path):
    script = batch("echo $CUDA_VISIBLE_DEVICES", HOLD.format(go=tmp_path / "go"))
    jobs = [cluster.submit(script, "--nodelist=n1", f"--gpus-per-node={count}") for count in (3, 5)]
    for job in jobs:
        job.wait_output("holding")
    (tmp_path / "go").touch()
    for job in jobs:
        job.wait("COMPLETED")
    given = [job.output().splitlines()[0].split(",") for job in jobs]
    assert [len(devices) for devices in given] == [3, 5]
    assert sorted(",".join(map(",".join, given)).split(",")) == list("01234567")


def test_more_gpus_than_a_node_has_are_refused(cluster):
    with pytest.raises(AssertionError, match="Requested node configuration is not available"):
        cluster.submit(batch("true"), "--gpus-per-node=9")


def test_a_failing_script_is_told_apart(cluster):
    job = cluster.submit(batch("exit 7"))
    job.wait("FAILED")
    assert (job.exit_code(), job.restarts()) == (7, 0)


@pytest.mark.parametrize("place", [0, 1], ids=["head", "worker"])
def test_a_crashed_node_fails_its_jobs_or_requeues_them(cluster, tmp_path, place):
    script = batch(f"srun bash -c '{HOLD.format(go=tmp_path / 'go')}'")
    again = cluster.submit(script, "--nodes=2", "--requeue")
    again.wait("RUNNING")
    nodes = again.nodes()
    failing = cluster.submit(script, "--no-requeue", f"--nodelist={nodes[place]}")
    failing.wait_output("holding")
    for node in nodes:
        again.wait_output(f"holding on {node}")
    cluster.crash(nodes[place])
    failing.wait("NODE_FAIL")
    again.wait("RUNNING", restarts=1)
    again.wait_output("holding")
    assert len(again.nodes()) == 2
    assert nodes[place] not in again.nodes()
    (tmp_path / "go").touch()
    again.wait("COMPLETED")
    cluster.start(nodes[place])
    cluster.wait_nodes("idle", nodes[place])


def test_a_node_off_the_network_is_down_until_it_is_back(cluster, tmp_path):
    job = cluster.submit(batch(HOLD.format(go=tmp_path / "go")), "--nodelist=n3", "--no-requeue")
    job.wait_output("holding")
    connect = ["timeout", "2", "bash", "-c", "< /dev/tcp/n3/6818"]  # slurmd's port
    cluster.run(connect)
    cluster.cut("n3")
    assert cluster.run(connect, check=False).returncode != 0
    cluster.wait_nodes("down*", "n3")
    assert cluster.run(["hostname"], on="n3").stdout == "n3\n"
    job.wait("NODE_FAIL")
    cluster.mend("n3")
    cluster.wait_nodes("idle", "n3")


def test_a_job_outlives_the_controllers_absence(cluster, tmp_path):
    job = cluster.submit(batch(HOLD.format(go=tmp_path / "go"), f"touch {tmp_path / 'done'}"))
    job.wait_output("holding")
    cluster.stop_controller()
    with pytest.raises(AssertionError, match="Unable to contact slurm controller"):
        cluster.run(["scontrol", "show", "job", str(job.id)])
    (tmp_path / "go").touch()
    until(lambda: (tmp_path / "done").exists(), seconds=60, otherwise=lambda: "the job did not continue")
    cluster.start_controller()
    job.wait("COMPLETED")
    assert job.restarts() == 0


def test_jobs_of_one_name_run_one_after_another(cluster, tmp_path):
    script = batch(HOLD.format(go=tmp_path / "go"), f"echo $SLURM_JOB_ID >> {tmp_path / 'order'}")
    first, second = (cluster.submit(script, "--job-name=train", "--dependency=singleton") for _ in range(2))
    first.wait_output("holding")
    until(lambda: second.reason() == "Dependency", seconds=60, otherwise=second.describe)
    assert second.state() == "PENDING"
    (tmp_path / "go").touch()
    second.wait("COMPLETED")
    assert (tmp_path / "order").read_text().split() == [str(first.id), str(second.id)]


def test_a_signal_reaches_the_batch_scripts_trap(cluster, tmp_path):
    """The trap forwards nothing, so the step continues and shows that it got no signal."""
    stepping = f"echo stepping; until [ -e {tmp_path / 'go'} ]; do sleep 0.2; done; echo stepped"
    job = cluster.submit(
        batch(
            "trap 'echo trapped' USR1",
            f"srun bash -c 'trap \"echo step signalled\" USR1; {stepping}' &",
            "step=$!",
            "while kill -0 $step 2> /dev/null; do wait $step; done",
            "echo ended",
        )
    )
    job.wait_output("stepping")
    job.signal("USR1")
    job.wait_output("trapped")
    (tmp_path / "go").touch()
    job.wait("COMPLETED")
    assert job.output().split() == ["stepping", "trapped", "stepped", "ended"]


def test_a_job_is_requeued_from_outside(cluster, tmp_path):
    script = batch("echo restart ${SLURM_RESTART_COUNT:-0}", HOLD.format(go=tmp_path / "go"))
    job = cluster.submit(script, "--requeue", "--open-mode=append")
    job.wait_output("holding")
    job.requeue()
    job.wait_output("restart 1")
    assert (job.state(), job.restarts()) == ("RUNNING", 1)
    (tmp_path / "go").touch()
    job.wait("COMPLETED")
    assert [line for line in job.output().splitlines() if "restart" in line] == ["restart 0", "restart 1"]


def test_a_job_is_cancelled(cluster):
    job = cluster.submit(batch("sleep 1000"))
    job.wait("RUNNING")
    job.cancel()
    job.wait("CANCELLED")


def test_a_time_limit_ends_a_job(cluster, limited):
    limited.wait("TIMEOUT")
    assert "told to end" in limited.output()
    assert limited.nodes() == ["n4"]
