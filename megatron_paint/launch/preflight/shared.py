"""Checks that all nodes see one run folder: the first node writes a token, the others read it and write an answer."""

import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

from megatron_paint.base.errors import UserError
from megatron_paint.launch.preflight.result import CheckResult
from megatron_paint.runtime.files import disk_errors, sync

CHECK = "shared folder"
PREFIX = ".preflight_"
TOKEN = "token"
OLD_SECONDS = 3600.0
PATIENCE = 5.0  # seconds within which a network file system must show what another node has written and synced
LOOK_SECONDS = 0.1
ADVICE = "mount the shared file system there, or give a run.dir on a shared file system"


def canary_folder(run: Path, name: str) -> Path:
    """The folder of the token. It is in logs/, so that the leftovers of a killed preflight do not block a new run."""
    return run / "logs" / f"{PREFIX}{name}"


def write_token(run: Path, name: str, token: str) -> CheckResult:
    """On the first node: writes the token and syncs it to the disk."""
    folder = canary_folder(run, name)
    try:
        with disk_errors(folder):
            folder.mkdir(parents=True)
            _clear_old(folder.parent)
            _write(folder / TOKEN, token)
    except UserError as error:
        return CheckResult(check=CHECK, ok=False, seen=str(error), advice="", fault="job")
    return CheckResult(check=CHECK, ok=True, seen=f"{run} on {mount_of(run)}")


def _clear_old(logs: Path) -> None:
    """Removes the leftovers of killed preflights. The token of a running preflight is younger."""
    for entry in logs.glob(f"{PREFIX}*"):
        if time.time() - entry.stat().st_mtime > OLD_SECONDS:
            shutil.rmtree(entry, ignore_errors=True)


def answer(
    run: Path, name: str, token: str, *, rank: int, node: str, first: str, patience: float = PATIENCE
) -> CheckResult:
    """On another node: reads the token and writes an answer into the same folder."""
    folder = canary_folder(run, name)
    seen = _read(folder / TOKEN, token, patience=patience)
    where = f"{run} is on {mount_of(run)} here"
    if seen is None:
        missing = f"{run} does not contain what {first} wrote into it: it is another folder; {where}"
        return CheckResult(check=CHECK, ok=False, seen=missing, advice=ADVICE)
    if seen != token:
        wrong = f"a file of {len(token)} bytes in {run} differs from what {first} wrote; {where}"
        return CheckResult(check=CHECK, ok=False, seen=wrong, advice="check the file system")
    try:
        with disk_errors(folder):
            _write(folder / str(rank), f"{token} {node}")
    except UserError as error:
        return CheckResult(check=CHECK, ok=False, seen=str(error))
    return CheckResult(check=CHECK, ok=True, seen=where)


def missing_answers(
    run: Path, name: str, token: str, answered: Mapping[int, str], *, first: str
) -> dict[str, CheckResult]:
    """On the first node: a failed result for each node whose answer is missing.

    answered: by rank, the names of the nodes that reported to have written an answer.
    """
    missing = {}
    deadline = time.monotonic() + PATIENCE
    for rank, node in answered.items():
        expected = f"{token} {node}"
        left = max(0.0, deadline - time.monotonic())
        if _read(canary_folder(run, name) / str(rank), expected, patience=left) != expected:
            seen = f"what it wrote into {run} did not appear on {first} within {PATIENCE:.0f} s"
            missing[node] = CheckResult(check=CHECK, ok=False, seen=seen, advice=ADVICE)
    return missing


def remove_token(run: Path, name: str) -> None:
    """Removes the token and all answers, also an answer that comes late."""
    shutil.rmtree(canary_folder(run, name), ignore_errors=True)


def mount_of(path: Path) -> str:
    """The type and mount point of the file system of a path, such as 'ext4 at /'."""
    best = ("unknown", "")
    try:
        real = os.path.realpath(path)
        for line in Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace").splitlines():
            _, point, kind, *_ = line.split(" ")
            point = point.replace("\\040", " ")
            inside = point == "/" or real == point or real.startswith(f"{point}/")
            if inside and len(point) >= len(best[1]):
                best = (kind, point)
    except (OSError, ValueError):
        return "an unknown file system"
    return f"{best[0]} at {best[1]}"


def _write(path: Path, text: str) -> None:
    with open(path, "x", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    sync(path.parent)


def _read(path: Path, expected: str, *, patience: float) -> str | None:
    """Waits for the expected text. After `patience` seconds: the text of the file, or None if there is no file."""
    deadline = time.monotonic() + patience
    while True:
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            text = None
        if text == expected or time.monotonic() >= deadline:
            return text
        time.sleep(LOOK_SECONDS)
