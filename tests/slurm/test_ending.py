"""Nothing of a cluster outlives its test run, however that ends. If no cluster can start, a reason is given."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.slurm import requirements
from tests.slurm.folders import remove_leftovers
from tests.support.until import until

ROOT = Path(__file__).parents[2]
RUN = """
import time
from tests.slurm.cluster import Cluster
with Cluster(nodes=2) as cluster:
    job = cluster.submit("#!/bin/bash\\nsrun bash -c 'echo running; sleep 1000'", "--nodes=2")
    job.wait_output("running\\nrunning")
    print(cluster.folder, flush=True)
    {then}
"""
THEN = {"failure": "raise SystemExit(1)", "control-c": "time.sleep(1000)", "kill": "time.sleep(1000)"}
SIGNALS = {"control-c": signal.SIGINT, "kill": signal.SIGKILL}


def processes(folder):
    """Those that have the folder in their command or environment, as all of a cluster have."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
            if os.fsencode(folder) in command + (process / "environ").read_bytes():
                found[int(process.name)] = command.replace(b"\0", b" ").decode()
        except OSError:
            continue
    return found


@pytest.fixture
def own_folder(monkeypatch):
    """A folder for temporary files in which no other cluster removes leftovers. Its path is short, as for a socket."""
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield folder


@pytest.mark.cluster
@pytest.mark.parametrize("ending", THEN)
def test_nothing_is_left(ending, own_folder):
    if missing := requirements.what_is_missing():
        pytest.skip(f"no Slurm cluster: {missing}")
    run = subprocess.Popen(
        [sys.executable, "-c", RUN.format(then=THEN[ending])],
        env=os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": own_folder},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    with run.stdout as printed:
        folder = Path(printed.readline().strip())
    assert folder.name.startswith("slurm-cluster-")
    if ending in SIGNALS:
        assert len(processes(folder)) > 10  # daemons, steps and their tasks
        os.killpg(run.pid, SIGNALS[ending])
    assert run.wait(timeout=600) != 0
    until(lambda: not processes(folder), seconds=30, otherwise=lambda: str(processes(folder)))
    assert str(folder) not in Path("/proc/self/mountinfo").read_text()
    if ending == "kill":
        assert folder.exists()
        remove_leftovers()  # as the next cluster does
    assert not folder.exists()


def test_a_reason_is_given_to_users_other_than_root(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert requirements.what_is_missing() == "only root can make network namespaces: run the tests as root"


def test_missing_programs_are_named_with_the_command_that_installs_them(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(requirements, "PATH", str(tmp_path))
    assert requirements.what_is_missing() == (
        "slurmctld, slurmd, sbatch, munged, ip, unshare, nsenter, setpriv not found: "
        "apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge iproute2"
    )
