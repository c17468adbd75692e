"""Where a trial trains, and what of its process the search reads."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_paint.runtime.processes import SEARCH
from megatron_paint.search.trial_run import Place, last_error, places

ROOT = Path(__file__).parents[2]


def test_places_without_gpus():
    """Four ranks a trial as one replica needs; 16 cores are divided among eight ranks."""
    assert places(jobs=2, processes=None, gpus=[], cores=16, ranks=4) == [Place(processes=4, threads=2)] * 2
    assert places(jobs=1, processes=3, gpus=[], cores=2, ranks=4) == [Place(processes=3, threads=1)]


@pytest.mark.parametrize(
    ("jobs", "gpus", "expected"),
    [
        (1, "01234567", ["01234567"]),
        (2, "01234567", ["0123", "4567"]),
        (3, "01234567", ["01", "23", "45"]),  # equal shares: two GPUs stay free
        (2, "57", ["5", "7"]),
    ],
)
def test_gpus_are_divided(jobs, gpus, expected):
    found = places(jobs=jobs, processes=None, gpus=list(gpus), cores=64, ranks=1)
    assert ["".join(place.gpus) for place in found] == expected
    assert [place.processes for place in found] == [len(share) for share in expected]


def test_the_environment_of_a_trial():
    outer = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "1", "HOME": "/h", "CUDA_VISIBLE_DEVICES": "0,1"}
    found = Place(processes=1, gpus=("1",), threads=3).environment(outer)
    expected = {"HOME": "/h", "CUDA_VISIBLE_DEVICES": "1", "OMP_NUM_THREADS": "3", SEARCH: str(os.getpid())}
    assert found == expected
    assert Place(processes=1).environment({"OMP_NUM_THREADS": "7"})["OMP_NUM_THREADS"] == "7"
    assert Place(processes=None).options == []


def test_a_trial_ends_with_its_search_and_its_ranks_do_not_know_it():
    """A process whose search has another number, because it has died, ends at once; the variable is gone after that."""
    code = "import os, sys; from megatron_paint.runtime.processes import end_with_launcher; end_with_launcher()\n"
    code += f"print(os.environ.get({SEARCH!r})); sys.stdout.flush()"
    for parent, printed, status in ((os.getpid(), "None\n", 0), (1, "", 1)):
        environment = os.environ | {"PYTHONPATH": str(ROOT), SEARCH: str(parent)}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert (done.stdout, done.returncode) == (printed, status), done


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("step 1\nmegatron-paint: error: the disk is full\nNote: x\n\n", "megatron-paint: error: the disk is full"),
        ("Traceback\nValueError: no\n", "ValueError: no"),
        ("\n", "it printed nothing"),
    ],
)
def test_the_last_error(tmp_path, text, expected):
    (tmp_path / "log").write_text(text)
    assert last_error(tmp_path / "log") == expected


def test_no_log(tmp_path):
    assert last_error(tmp_path / "log").startswith("no log: ")
