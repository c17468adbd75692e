"""Whether all nodes see one run folder: a token is written by the first node, read and answered by the others."""

import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

from megatron_paint.base.errors import UserError
from megatron_paint.launch.preflight.result import Finding
from megatron_paint.runtime.files import disk_errors, sync

CHECK = "shared folder"
PREFIX = ".preflight_"
TOKEN = "token"
OLD_SECONDS = 3600.0
PATIENCE = 5.0  # seconds in which a network file system must show what another node has synced
LOOK_SECONDS = 0.1
ADVICE = "mount the shared file system there, or give a run.dir that is on one"


def canary_folder(run: Path, name: str) -> Path:
    """Where the token lies: in logs/, so that what a killed preflight leaves is not in a new run's way."""
    return run / "logs" / f"{PREFIX}{name}"


def release(run: Path, name: str, token: str) -> Finding:
    """On the first node: writes the token and brings it onto the disk."""
    folder = canary_folder(run, name)
    try:
        with disk_errors(folder):
            folder.mkdir(parents=True)
            _clear_old(folder.parent)
            _write(folder / TOKEN, token)
    except UserError as error:
        return Finding(check=CHECK, ok=False, seen=str(error), advice="", fault="job")
    return Finding(check=CHECK, ok=True, seen=f"{run} on {mount_of(run)}")


def _clear_old(logs: Path) -> None:
    """Removes what preflights left that were killed; one that still runs is younger."""
    for entry in logs.glob(f"{PREFIX}*"):
        if time.time() - entry.stat().st_mtime > OLD_SECONDS:
            shutil.rmtree(entry, ignore_errors=True)


def answer(
    run: Path, name: str, token: str, *, rank: int, node: str, first: str, patience: float = PATIENCE
) -> Finding:
    """On another node: reads the token and writes it back beside it."""
    folder = canary_folder(run, name)
    seen = _read(folder / TOKEN, token, patience=patience)
    where = f"{run} is on {mount_of(run)} here"
    if seen is None:
        lacking = f"{run} does not show what {first} wrote into it: it is another folder; {where}"
        return Finding(check=CHECK, ok=False, seen=lacking, advice=ADVICE)
    if seen != token:
        wrong = f"a file in {run} reads otherwise than {first} wrote it, {len(token)} bytes; {where}"
        return Finding(check=CHECK, ok=False, seen=wrong, advice="have the file system looked at")
    try:
        with disk_errors(folder):
            _write(folder / str(rank), f"{token} {node}")
    except UserError as error:
        return Finding(check=CHECK, ok=False, seen=str(error))
    return Finding(check=CHECK, ok=True, seen=where)


def missing_answers(run: Path, name: str, token: str, answered: Mapping[int, str], *, first: str) -> dict[str, Finding]:
    """On the first node: findings of the nodes that say they wrote, and whose files are not there.

    answered: by rank, the names of the nodes that wrote.
    """
    missing = {}
    deadline = time.monotonic() + PATIENCE
    for rank, node in answered.items():
        expected = f"{token} {node}"
        left = max(0.0, deadline - time.monotonic())
        if _read(canary_folder(run, name) / str(rank), expected, patience=left) != expected:
            seen = f"what it wrote into {run} is not seen on {first} within {PATIENCE:.0f} s"
            missing[node] = Finding(check=CHECK, ok=False, seen=seen, advice=ADVICE)
    return missing


def remove(run: Path, name: str) -> None:
    """Takes the token away again; also that of an answer that comes late."""
    shutil.rmtree(canary_folder(run, name), ignore_errors=True)


def mount_of(path: Path) -> str:
    """The kind and mount point of the file system that a path lies on, such as 'ext4 at /'."""
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
    """The file's text once it is what is expected; else what it is when patience ends, None if it is not there."""
    deadline = time.monotonic() + patience
    while True:
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            text = None
        if text == expected or time.monotonic() >= deadline:
            return text
        time.sleep(LOOK_SECONDS)
