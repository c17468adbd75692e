"""The lock of a run folder whose owner is a Slurm job, or was one."""

import dataclasses
import os
import socket
import threading
import time

import pytest

from megatron_paint.base.errors import UserError
from megatron_paint.run.lock import RunLock
from megatron_paint.run.lock_owner import job_state, this_process
from megatron_paint.run.lock_watch import LOCK, refuse_if_in_use
from tests.run.lock_racer import TIMING
from tests.run.test_lock import FORK, beating, elsewhere, left_by, names

JOB = {"SLURM_CLUSTER_NAME": "c", "SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "1"}


def test_a_requeued_job_takes_over_from_its_dead_node_after_a_look(tmp_path, monkeypatch):
    for name, value in JOB.items():
        monkeypatch.setenv(name, value)
    left_by(tmp_path, elsewhere(cluster="c", job="77", restart=0), age=30.0)
    lock = RunLock(tmp_path, timing=TIMING)
    started, waits = time.monotonic(), []
    line = lock.take(on_wait=waits.append)
    assert TIMING.look < time.monotonic() - started < TIMING.limit
    assert waits == [
        f"{tmp_path} is locked by process 4321 on node7, Slurm job 77: watching its heartbeat, for 0.5 s at most"
    ]
    assert "process 4321 on node7, Slurm job 77: Slurm has ended its job, and its heartbeat has stopped" in line
    lock.release()


def test_heartbeats_that_a_host_dates_by_its_own_clock(tmp_path, monkeypatch):
    """Lustre and GPFS let the client date them. The clock of this client is behind, so they look old and are none."""
    for name, value in JOB.items():
        monkeypatch.setenv(name, value)
    left_by(tmp_path, elsewhere(cluster="c", job="77", restart=0), age=1000.0)
    stop = beating(tmp_path / LOCK, behind=1000.0)
    lock = RunLock(tmp_path, timing=TIMING)
    try:
        assert "the process that still runs will end" in lock.take()
    finally:
        stop()
    lock.release()


@pytest.mark.parametrize(
    ("changes", "squeue", "state"),
    [
        ({"job": "77", "restart": 0}, None, "ended"),
        ({"job": "77", "restart": 1}, None, "active"),
        ({"job": "77", "restart": 2}, None, "active"),
        ({"job": "77", "restart": 0, "cluster": "other"}, None, "unknown"),
        ({"job": "76"}, "echo COMPLETED", "ended"),
        ({"job": "76"}, "echo PENDING", "ended"),
        ({"job": "76"}, "echo RUNNING", "active"),
        ({"job": "76"}, "echo COMPLETING", "completing"),
        ({"job": "76"}, "echo COMPLETING; echo RUNNING", "active"),  # a heterogeneous job
        ({"job": "76"}, "echo NODE_FAIL", "ended"),
        ({"job": "76"}, "echo slurm_load_jobs error: Invalid job id specified >&2; exit 1", "ended"),
        ({"job": "76"}, "echo slurm_load_jobs error: Unable to contact slurm controller >&2; exit 1", "unknown"),
        ({"job": "76"}, None, "unknown"),
        ({"job": "76", "cluster": ""}, "echo COMPLETED", "unknown"),
        ({"job": ""}, "echo COMPLETED", "unknown"),
    ],
)
def test_what_slurm_knows_of_a_job(tmp_path, monkeypatch, changes, squeue, state):
    monkeypatch.setenv("PATH", str(tmp_path))
    if squeue is not None:
        squeue_says(tmp_path, squeue)
    owner = elsewhere(**({"cluster": "c", "restart": 0} | changes))
    assert job_state(owner, JOB) == state
    outside = {"SLURM_CLUSTER_NAME": "c"}
    if state == "completing":
        assert job_state(owner, outside) == "active"  # only a job waits for its predecessor


def squeue_says(folder, squeue):
    (folder / "squeue").write_text(f"#!/bin/sh\n{squeue}\n")
    (folder / "squeue").chmod(0o755)


@pytest.mark.parametrize("job", ["76", "77"])
def test_a_process_of_this_machine_may_outlive_its_job(tmp_path, monkeypatch, job):
    """A shell in tmux keeps the SLURM_JOB_ID of a job that has ended, and a run that starts in it inherits that."""
    (tmp_path / "bin").mkdir()
    squeue_says(tmp_path / "bin", "echo COMPLETED")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    for name, value in JOB.items():
        monkeypatch.setenv(name, value)
    run = tmp_path / "run"
    old = RunLock(run, timing=TIMING, owner=dataclasses.replace(this_process(), job=job, restart=0))
    old.take()
    with pytest.raises(UserError, match=rf"is in use: process {os.getpid()} on .*\(kill {os.getpid()} on "):
        RunLock(run, timing=TIMING).take()
    with pytest.raises(UserError, match=rf"is in use: process {os.getpid()} on .*\(kill {os.getpid()} on "):
        refuse_if_in_use(run, timing=TIMING)
    old.confirm()
    old.release()


@pytest.fixture
def predecessor(tmp_path, monkeypatch):
    """Sets what Slurm says of job 76, and this process is job 77 of the same cluster."""
    bin_folder, state = tmp_path / "bin", tmp_path / "state"
    bin_folder.mkdir()
    squeue_says(bin_folder, f"cat {state}")
    monkeypatch.setenv("PATH", str(bin_folder), prepend=os.pathsep)
    for name, value in (JOB | {"SLURM_RESTART_COUNT": "0"}).items():
        monkeypatch.setenv(name, value)
    state.write_text("COMPLETING\n")

    def says(text):
        (tmp_path / "new").write_text(f"{text}\n")
        (tmp_path / "new").rename(state)

    return says


WAIT = "{0} is locked by process {1} on {2}, Slurm job 76, which Slurm is ending: waiting for its end, for 3 s at most"


def test_a_job_waits_for_the_end_of_its_predecessor_elsewhere(tmp_path, predecessor):
    """Slurm starts a waiting job while the processes of the earlier one still write, for KillWait."""
    run = tmp_path / "run"
    left_by(run, elsewhere(cluster="c", job="76"))
    stop = beating(run / LOCK)

    def end():
        stop()
        predecessor("CANCELLED")

    timer = threading.Timer(1.0, end)
    timer.start()
    lock, started, waits = RunLock(run, timing=TIMING), time.monotonic(), []
    assert "Slurm has ended its job, and its heartbeat has stopped" in lock.take(on_wait=waits.append)
    assert time.monotonic() - started > 1.0 + TIMING.look
    assert waits[0] == WAIT.format(run, 4321, "node7")
    timer.join()
    lock.release()


@pytest.mark.parametrize("removes", [True, False])
def test_a_job_waits_for_the_end_of_its_predecessor_on_this_machine(tmp_path, predecessor, removes):
    """The predecessor removes its lock, or Slurm kills it first."""
    run, (parent, child) = tmp_path / "run", FORK.Pipe(duplex=False)

    def train():
        lock = RunLock(run, timing=TIMING, owner=dataclasses.replace(this_process(), job="76"))
        lock.take()
        child.send(None)
        time.sleep(1.0)
        if removes:
            lock.release()
            time.sleep(0.3)
        os._exit(0)

    process = FORK.Process(target=train)
    process.start()
    threading.Thread(target=process.join).start()  # else it remains as a zombie
    parent.recv()
    waits = []
    refuse_if_in_use(run, timing=TIMING, on_wait=waits.append)
    lock = RunLock(run, timing=TIMING)
    assert ("its process is gone" in lock.take()) != removes
    assert waits == [WAIT.format(run, process.pid, socket.gethostname())]
    lock.release()


def test_a_predecessor_that_does_not_end(tmp_path, predecessor):
    run = tmp_path / "run"
    left_by(run, elsewhere(cluster="c", job="76"))
    stop = beating(run / LOCK)
    try:
        for act in (RunLock(run, timing=TIMING).take, lambda: refuse_if_in_use(run, timing=TIMING)):
            started = time.monotonic()
            with pytest.raises(UserError, match=r"is in use: process 4321 on node7, Slurm job 76.*\(scancel 76\)"):
                act()
            assert TIMING.completing < time.monotonic() - started < TIMING.completing + TIMING.limit
    finally:
        stop()


def test_a_predecessor_whose_node_died(tmp_path, predecessor):
    """Its job completes for as long as Slurm waits for the node. Its heartbeat says earlier that it is dead."""
    run = tmp_path / "run"
    left_by(run, elsewhere(cluster="c", job="76"))
    lock, started = RunLock(run, timing=dataclasses.replace(TIMING, completing=60.0)), time.monotonic()
    assert "from process 4321 on node7, Slurm job 76: its heartbeat has stopped" in lock.take()
    assert TIMING.limit < time.monotonic() - started < 10 * TIMING.limit
    lock.release()


def test_a_process_whose_job_slurm_has_restarted_elsewhere_ends(tmp_path, monkeypatch):
    """Its node was cut off from Slurm and not from the disk. It notices before the new owner writes anything."""
    messages = []
    there = dataclasses.replace(this_process(), machine="another", cluster="c", job="77")
    old = RunLock(tmp_path, timing=TIMING, owner=there)
    old.take(on_lost=messages.append)
    for name, value in JOB.items():
        monkeypatch.setenv(name, value)
    new = RunLock(tmp_path, timing=TIMING)
    assert "the process that still runs will end" in new.take()
    assert len(messages) == 1
    assert "was taken over by process" in messages[0]
    assert old.is_lost
    with pytest.raises(UserError, match="was taken over"):
        old.confirm()
    old.release()
    new.confirm()
    new.release()
    assert names(tmp_path) == []
