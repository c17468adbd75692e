"""The peak memory of this process, for metrics.jsonl."""

import resource

import torch

KILOBYTE = 1024  # the unit in which Linux counts it


def peak_memory() -> dict[str, float]:
    """Peaks in GB: `memory/host_gb` of the process since its start; on a GPU `memory/device_gb` since the last call."""
    found = {"memory/host_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KILOBYTE / 1e9}
    if torch.cuda.is_available():
        found["memory/device_gb"] = torch.cuda.max_memory_allocated() / 1e9
        torch.cuda.reset_peak_memory_stats()
    return found
