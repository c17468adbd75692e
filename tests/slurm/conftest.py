"""One cluster for all tests of a worker."""

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.requirements import what_is_missing


@pytest.fixture(scope="session")
def shared_cluster() -> Iterator[Cluster]:
    """Four nodes of 8 GPUs, 96 CPUs and 2 TB; skips, with the reason, where Slurm cannot run."""
    if missing := what_is_missing():
        pytest.skip(f"no Slurm cluster: {missing}")
    with Cluster(nodes=4, gpus=8, cpus=96) as running:
        yield running


@pytest.fixture
def cluster(shared_cluster) -> Iterator[Cluster]:
    """The shared cluster, with every node up and no job left after the test, however it ended."""
    yield shared_cluster
    shared_cluster.repair()
