"""Several nodes of a preflight on this machine, each in a separate process group; torch is imported once for all.

Run as a program with one JSON argument: {"nodes": [{"name": .., "arguments": [..], "faults": {..}}, ..]}. Prints one
JSON line for each node that ends: its name, exit status and output. Faults replace answers of the machine.
"""

import json
import os
import signal
import sys
import tempfile
import time
from dataclasses import replace
from types import SimpleNamespace

from megatron_paint.launch.preflight.command import import_all, main
from megatron_paint.launch.preflight.probes import Probes
from megatron_paint.launch.preflight.store import NodeStore
from megatron_paint.runtime.processes import end_with_parent

PATIENCE = 1.0  # seconds; all nodes write to the same local disk


def probes_with(faults: dict) -> Probes:
    """The machine's answers, except for the faults."""
    probes = Probes(
        versions=lambda: {"torch": "2.13.0", "triton": "absent"}, gpus=lambda: faults.get("gpus", 0), patience=PATIENCE
    )
    if "ahead" in faults:
        probes = replace(probes, clock=lambda: time.time() + faults["ahead"])
    if "versions" in faults:
        probes = replace(probes, versions=lambda: faults["versions"])
    if "free" in faults:
        disk = SimpleNamespace(f_bavail=faults["free"], f_frsize=1, f_files=100, f_favail=faults.get("inodes", 100))
        probes = replace(probes, statvfs=lambda path: disk)
    if faults.get("stops"):
        probes = replace(probes, contribution=stop)
    if "adds" in faults:
        probes = replace(probes, contribution=lambda rank: faults["adds"])
    return probes


def stop(rank: int) -> float:
    """Stops this node and all its processes at the moment when it would add its part."""
    os.killpg(0, signal.SIGSTOP)
    return rank + 1.0


def hold_up(seconds: dict[str, float]) -> None:
    """Delays this node by so many seconds when it posts or reads one of these keys."""
    for name in ("post", "wait_for"):
        original = getattr(NodeStore, name)

        def late(self, key, *arguments, original=original, **options):
            time.sleep(seconds.get(key, 0.0))
            return original(self, key, *arguments, **options)

        setattr(NodeStore, name, late)


def start(node: dict) -> tuple[int, str]:
    """Starts one node; its process id and the file of its output."""
    descriptor, path = tempfile.mkstemp()
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        end_with_parent(parent)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        faults = node.get("faults", {})
        hold_up(faults.get("held_up", {}))
        status = main(node["arguments"], probes_with(faults))
        sys.stdout.flush()
        os._exit(status)
    os.close(descriptor)
    return pid, path


def run(nodes: list[dict]) -> None:
    """Starts all nodes and reports each one that ends. It kills a node that stopped itself."""
    running = {}
    for node in nodes:
        pid, path = start(node)
        running[pid] = (node["name"], path)
    stopped = set()
    while running.keys() - stopped:
        pid, status = os.waitpid(-1, os.WUNTRACED)
        if os.WIFSTOPPED(status):
            stopped.add(pid)
            continue
        name, path = running.pop(pid)
        report(name, os.waitstatus_to_exitcode(status), path)
    for pid in stopped:
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        name, path = running.pop(pid)
        report(name, "stopped", path)


def report(name: str, status: int | str, path: str) -> None:
    """One line for a node that has ended."""
    with open(path, encoding="utf-8") as stream:
        text = stream.read()
    os.unlink(path)
    print(json.dumps({"name": name, "status": status, "output": text}), flush=True)


if __name__ == "__main__":
    import_all()  # what the nodes share
    run(json.loads(sys.argv[1])["nodes"])
