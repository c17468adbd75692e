"""The peak memory of a process, against memory that the test itself takes."""

import numpy as np

from megatron_paint.training.peak_memory import peak_memory


def test_the_peak_grows_with_what_is_taken_and_stays():
    before = peak_memory()
    assert set(before) <= {"memory/host_gb", "memory/device_gb"}
    size = before["memory/host_gb"] + 0.2  # more than the process ever had
    taken = np.ones(int(size * 1e9 / 8))
    during = peak_memory()["memory/host_gb"]
    assert size <= during < size + before["memory/host_gb"] + 0.1
    del taken
    assert peak_memory()["memory/host_gb"] >= during
