"""The lock of a run folder on a disk that hosts share. Each host has a separate name, network and process ids."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_paint.run.lock_watch import LOCK, read_lock
from tests.run.lock_racer import TIMING
from tests.run.test_lock import elsewhere, left_by, names

ROOT = Path(__file__).parents[2]


def unshared(host, *command):
    """A command on a separate host."""
    return [
        *("unshare", "--user", "--map-root-user", "--uts", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"),
        *("sh", "-c", 'hostname "$0" && exec "$@"', host, *map(str, command)),
    ]


def why_no_hosts():
    try:
        done = subprocess.run(unshared("node1", "hostname"), capture_output=True, text=True, timeout=30)
    except OSError as error:
        return str(error)
    return "" if done.stdout.strip() == "node1" else done.stderr.strip() or "hosts have no separate names"


@pytest.fixture(scope="module")
def hosts():
    if why := why_no_hosts():
        pytest.skip(f"no namespaces here: {why}")


def start(host, folder, seconds):
    command = (sys.executable, "-m", "tests.run.lock_racer", seconds, folder, folder.parent / "journal")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        unshared(host, *command), cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def inner(process):
    """Process id, as this host sees it, of the command in the namespaces."""
    (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return int(child)


def test_two_hosts_on_one_disk(hosts, tmp_path):
    folder = tmp_path / "run"
    first = start("node1", folder, 60)
    assert first.stdout.readline().startswith("owner ")
    assert read_lock(folder / LOCK).host == "node1"
    out, err = start("node2", folder, 1).communicate(timeout=60)
    assert out.startswith("refused: ")
    assert f"{folder} is in use: process 1 on node1 " in out, (out, err)
    first.kill()  # with all of its host
    first.communicate()
    started = time.monotonic()
    out, err = start("node2", folder, 0).communicate(timeout=60)
    assert f"took over the lock of {folder} from process 1 on node1: its heartbeat has stopped" in out, (out, err)
    assert time.monotonic() - started < TIMING.limit + 10
    assert names(folder) == []


def test_a_suspended_host_notices_that_it_lost_the_run(hosts, tmp_path):
    folder = tmp_path / "run"
    first = start("node1", folder, 60)
    first.stdout.readline()
    os.kill(inner(first), signal.SIGSTOP)
    second = start("node2", folder, 60)
    assert "from process 1 on node1: its heartbeat has stopped" in second.stdout.readline()
    os.kill(inner(first), signal.SIGCONT)
    _, err = first.communicate(timeout=30)
    assert first.returncode != 0
    assert "was taken over by process 1 on node2" in err
    assert (tmp_path / "journal").read_text().split()[::3] == ["begin", "begin"]  # the first one has ended nothing
    assert read_lock(folder / LOCK).host == "node2"
    second.kill()
    second.communicate()


def test_hosts_that_take_a_dead_lock_at_the_same_moment(hosts, tmp_path):
    folder = tmp_path / "run"
    left_by(folder, elsewhere())
    both = [start(host, folder, 3) for host in ("node1", "node2", "node3")]
    told = [process.communicate(timeout=60)[0] for process in both]
    assert sorted(text.split()[0] for text in told) == ["owner", "refused:", "refused:"], told
