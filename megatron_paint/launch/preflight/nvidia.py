"""What nvidia-smi says about the GPUs' health; its answers are read by pure functions."""

import os
import shutil
import subprocess
from collections.abc import Mapping

SECONDS = 10.0
ABSENT = ("n/a", "[n/a]", "[not supported]", "not supported", "[unknown error]", "")

# Fields of `nvidia-smi --query-gpu`, what a value other than the good one means, and what to do.
HEALTH = {
    "ecc.errors.uncorrected.volatile.total": ("0", "uncorrected ECC errors since the last reset", "reset the GPU"),
    "retired_pages.pending": ("no", "memory pages wait to be retired", "reboot the node"),
    "clocks_throttle_reasons.hw_slowdown": ("not active", "the hardware slows its clocks down", "check its power"),
    "clocks_throttle_reasons.hw_thermal_slowdown": ("not active", "it is too hot", "check its cooling"),
    "clocks_throttle_reasons.hw_power_brake_slowdown": ("not active", "its power is braked", "check its power"),
}
# Fields of `nvidia-smi --query-remapped-rows`, on GPUs newer than those that retire pages.
ROWS = {
    "remapped_rows.pending": ("0", "memory rows wait to be remapped", "reset the GPU"),
    "remapped_rows.failure": ("0", "a memory row could not be remapped", "have the GPU replaced"),
}


def is_there() -> bool:
    """Whether this machine has nvidia-smi."""
    return shutil.which("nvidia-smi") is not None


def driver_version() -> str:
    """Version of the CUDA driver; empty where there is none."""
    rows = _ask("--query-gpu=driver_version") if is_there() else []
    return rows[0][0] if rows else ""


def health_problems(environ: Mapping[str, str] = os.environ) -> list[str]:
    """What is wrong with the GPUs that this job may see, each with what to do; empty without nvidia-smi."""
    if not is_there():
        return []
    problems = []
    uuids = {uuid: index for index, uuid in _ask("--query-gpu=index,uuid")}
    for query, fields in (("--query-gpu=uuid", HEALTH), ("--query-remapped-rows=gpu_uuid", ROWS)):
        for uuid, *values in _ask(",".join((query, *fields))):
            index = uuids.get(uuid, "?")
            if is_visible(index, uuid, environ.get("CUDA_VISIBLE_DEVICES")):
                problems += [f"GPU {index} {problem}" for problem in read_health(fields, values)]
    return problems


def read_health(fields: Mapping[str, tuple[str, str, str]], values: list[str]) -> list[str]:
    """What one GPU's values say that is not good; a field that it does not have says nothing."""
    problems = []
    for value, (good, meaning, remedy) in zip(values, fields.values(), strict=True):
        if value.lower() not in (good, *ABSENT):
            problems.append(f"({meaning}: {value}; {remedy})")
    return problems


def is_visible(index: str, uuid: str, devices: str | None) -> bool:
    """Whether CUDA_VISIBLE_DEVICES shows a GPU; a MIG device's name says nothing of its GPU, so all count then."""
    if devices is None or "MIG" in devices:
        return True
    shown = [part.strip() for part in devices.split(",")]
    return index in shown or any(part and uuid.startswith(part) for part in shown)


def _ask(query: str) -> list[list[str]]:
    """Rows of an answer; empty where this nvidia-smi does not know the question."""
    command = ["nvidia-smi", query, "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    if answer.returncode != 0:
        return []
    return [[part.strip() for part in line.split(",")] for line in answer.stdout.splitlines() if line.strip()]
