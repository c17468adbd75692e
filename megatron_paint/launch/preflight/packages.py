"""Compares the versions that must be the same on every node. It reads them without importing the packages."""

import subprocess
from collections import Counter
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import megatron_paint
from megatron_paint.base.counts import count_text
from megatron_paint.launch.preflight import nvidia
from megatron_paint.launch.preflight.result import CheckResult

DISTRIBUTIONS = ("torch", "megatron-core", "transformer-engine", "triton")
ABSENT = "absent"
GIT_SECONDS = 5.0


def versions() -> dict[str, str]:
    """Version of each package and of the CUDA driver; 'absent' if it is not installed."""
    found = {name: _version(name) for name in DISTRIBUTIONS}
    return {**found, "megatron_paint": _our_version(), "CUDA driver": nvidia.driver_version() or ABSENT}


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ABSENT


def _our_version() -> str:
    """The version; with the commit if the package runs from its git repository."""
    root = Path(megatron_paint.__file__).parents[1]
    if not (root / ".git").exists():
        return megatron_paint.__version__
    command = ["git", "-c", f"safe.directory={root}", "-C", str(root), "rev-parse", "--short=12", "HEAD"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=GIT_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return megatron_paint.__version__
    commit = answer.stdout.strip()
    return f"{megatron_paint.__version__} ({commit})" if answer.returncode == 0 else megatron_paint.__version__


def compare_nodes(check: str, seen: Mapping[str, Mapping[str, str]], advice: str) -> list[CheckResult]:
    """A result for each node: does it have the same value as most nodes?

    seen: by node, then by name of the value. If no value is on more than half of the nodes, no node is blamed. Then
    every node's result lists the values of all nodes.
    """
    problems: dict[str, list[str]] = {node: [] for node in seen}
    blamed: set[str] = set()
    for name in dict.fromkeys(name for values in seen.values() for name in values):
        values = {node: of.get(name, ABSENT) for node, of in seen.items()}
        usual, count = Counter(values.values()).most_common(1)[0]
        if count == len(values):
            continue
        if 2 * count <= len(values):
            for node in values:
                problems[node].append(f"{name} differs: {', '.join(f'{v} on {n}' for n, v in values.items())}")
            continue
        for node, value in values.items():
            if value != usual:
                blamed.add(node)
                problems[node].append(f"{name} is {value}, but {usual} on {count} of {count_text(len(values), 'node')}")
    return [
        CheckResult(
            check=check,
            ok=not found,
            seen="; ".join(found) or ", ".join(f"{name} {value}" for name, value in seen[node].items()),
            advice=advice if found else "",
            fault="node" if node in blamed else "job",
            node=node,
        )
        for node, found in problems.items()
    ]
