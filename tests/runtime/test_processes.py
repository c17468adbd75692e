"""Worker processes do not outlive a process that was killed, and leave Ctrl-C to it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.until import until

ROOT = Path(__file__).parents[2]
OWNER = """
import time
from megatron_paint.masker.overlap import MaskerPool, Pair, measure_overlaps
if __name__ == "__main__":
    pool = MaskerPool(1, from_characters=0)
    measure_overlaps([Pair("p", "s", "r")], pool=pool)
    print(*pool._executor._processes, flush=True)
    time.sleep(100)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_a_worker_ends_with_its_owner(tmp_path):
    (tmp_path / "owner.py").write_text(OWNER)
    owner = subprocess.Popen(
        [sys.executable, tmp_path / "owner.py"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    worker = Path("/proc") / owner.stdout.readline().strip()
    os.kill(int(worker.name), signal.SIGINT)
    time.sleep(0.5)
    assert _runs(worker)
    owner.kill()
    owner.communicate()
    until(lambda: not _runs(worker), seconds=10, otherwise=lambda: "the worker still runs", every=0.05)


def _runs(process):
    try:
        return b"spawn_main" in (process / "cmdline").read_bytes()
    except OSError:
        return False
