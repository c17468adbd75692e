"""The health of the GPUs as nvidia-smi reports it. Pure functions read its answers."""

import os
import shutil
import subprocess
from collections.abc import Mapping

SECONDS = 10.0
ABSENT = ("n/a", "[n/a]", "[not supported]", "not supported", "[unknown error]", "")

# Fields of `nvidia-smi --query-gpu`: the good value, what another value means, and what to do.
HEALTH = {
    "ecc.errors.uncorrected.volatile.total": ("0", "uncorrected ECC errors since the last reset", "reset the GPU"),
    "retired_pages.pending": ("no", "memory pages are waiting to be retired", "reboot the node"),
    "clocks_throttle_reasons.hw_slowdown": ("not active", "the hardware slows its clocks down", "check its power"),
    "clocks_throttle_reasons.hw_thermal_slowdown": ("not active", "it is too hot", "check its cooling"),
    "clocks_throttle_reasons.hw_power_brake_slowdown": ("not active", "its power is limited", "check its power"),
}
# Fields of `nvidia-smi --query-remapped-rows`. Newer GPUs remap rows and retire no pages.
ROWS = {
    "remapped_rows.pending": ("0", "memory rows are waiting to be remapped", "reset the GPU"),
    "remapped_rows.failure": ("0", "a memory row could not be remapped", "have the GPU replaced"),
}


def is_installed() -> bool:
    """Whether this machine has nvidia-smi."""
    return shutil.which("nvidia-smi") is not None


def driver_version() -> str:
    """Version of the CUDA driver; empty if there is none."""
    rows = _ask("--query-gpu=driver_version") if is_installed() else []
    return rows[0][0] if rows else ""


def health_problems(environ: Mapping[str, str] = os.environ) -> list[str]:
    """The problems of the GPUs that this job may use, each with a remedy; empty without nvidia-smi."""
    if not is_installed():
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
    """The problems that one GPU's values show. A field that the GPU does not have is ignored."""
    problems = []
    for value, (good, meaning, remedy) in zip(values, fields.values(), strict=True):
        if value.lower() not in (good, *ABSENT):
            problems.append(f"({meaning}: {value}; {remedy})")
    return problems


def is_visible(index: str, uuid: str, devices: str | None) -> bool:
    """Whether CUDA_VISIBLE_DEVICES shows a GPU. With MIG devices it shows all GPUs: their names name no GPU."""
    if devices is None or "MIG" in devices:
        return True
    shown = [part.strip() for part in devices.split(",")]
    return index in shown or any(part and uuid.startswith(part) for part in shown)


def _ask(query: str) -> list[list[str]]:
    """Rows of an answer; empty if this nvidia-smi does not support the query."""
    command = ["nvidia-smi", query, "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    if answer.returncode != 0:
        return []
    return [[part.strip() for part in line.split(",")] for line in answer.stdout.splitlines() if line.strip()]
