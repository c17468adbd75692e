"""One cluster for all tests of a worker, and the reference runs."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.requirements import what_is_missing
from tests.slurm.shipped import ENVIRONMENT, MINUTES, ROOT, SETTINGS


@pytest.fixture(scope="session")
def shared_cluster() -> Iterator[Cluster]:
    """Four nodes of 8 GPUs, 96 CPUs and 2 TB; skips with the reason if Slurm cannot run."""
    if missing := what_is_missing():
        pytest.skip(f"no Slurm cluster: {missing}")
    with Cluster(nodes=4, gpus=8, cpus=96) as running:
        yield running


@pytest.fixture
def cluster(shared_cluster) -> Iterator[Cluster]:
    """The shared cluster, with every node up and no job left after the test, however it ended."""
    yield shared_cluster
    shared_cluster.repair()


@pytest.fixture(scope="session")
def on_one_machine(tmp_path_factory) -> Callable[..., Path]:
    """Trains in one piece on this machine, without Slurm: `on_one_machine(processes, *settings)` returns the run."""

    def train(processes: int, *settings: str) -> Path:
        run = tmp_path_factory.mktemp("one") / "run"
        command = [sys.executable, "-m", "megatron_paint", "train", *SETTINGS, *settings, f"run.dir={run}"]
        command += ["--processes", str(processes)]
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=MINUTES
        )
        assert done.returncode == 0, done.stderr
        return run

    return train


@pytest.fixture(scope="session")
def undisturbed(on_one_machine) -> Path:
    """The run of tests/slurm/shipped.py, undisturbed."""
    return on_one_machine(4)
