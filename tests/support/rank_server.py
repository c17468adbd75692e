"""Forks the ranks of many short runs from one process that has imported everything; started by `forked_ranks.py`.

Reads one job a line from stdin, as JSON, and answers each with a line: see `forked_ranks.run`.
"""

import faulthandler
import importlib
import json
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path

import transformers  # noqa: F401

import megatron_paint.mcore.policy
import megatron_paint.training.inputs
import megatron_paint.training.start  # noqa: F401

EVENTS = {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.truncate"}


def main() -> None:
    for line in sys.stdin:
        job = json.loads(line)
        print(json.dumps(run(job)), flush=True)


def run(job: dict) -> dict:
    """Forks the ranks of one job and waits for them; `hung` tells that the time was up and they were killed."""
    pids: list[int] = []
    for rank in range(job["processes"]):
        pid = os.fork()
        if pid == 0:
            rank_main(job, rank)
            sys.exit()
        pids.append(pid)
        os.setpgid(pid, pids[0])
    statuses: list[int | None] = [None] * len(pids)
    deadline = time.monotonic() + job["limit"]
    while None in statuses and time.monotonic() < deadline:
        for rank, pid in enumerate(pids):
            if statuses[rank] is None and (ended := os.waitpid(pid, os.WNOHANG)) != (0, 0):
                statuses[rank] = os.waitstatus_to_exitcode(ended[1])
        time.sleep(0.01)
    hung = None in statuses
    for rank, pid in enumerate(pids):
        if statuses[rank] is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return {"statuses": statuses, "hung": hung}


def rank_main(job: dict, rank: int) -> None:
    """One rank, in its own process."""
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{job['folder']}/{name}{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    faulthandler.enable()
    faulthandler.dump_traceback_later(0.9 * job["limit"])  # where it hangs
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job["processes"])}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(job["port"])}
    if (size := job["file_size"].get(str(rank))) is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    if job["kill"] is not None and rank == 0:
        kill_at_event(Path(job["kill"]["below"]), event=job["kill"]["event"], delay=job["kill"]["delay"])
    module, function = job["target"].split(":")
    sys.argv[1:] = job["arguments"]
    getattr(importlib.import_module(module), function)()


def kill_at_event(folder: Path, *, event: int, delay: float) -> None:
    """Kills all ranks `delay` seconds after the event-th time that something below the folder is opened or renamed."""
    seen = 0

    def kill(name: str, path: str) -> None:
        time.sleep(delay)
        os.write(2, f"killed at {name} {path}\n".encode())
        os.killpg(os.getpgrp(), signal.SIGKILL)

    def hook(name: str, arguments: tuple) -> None:
        nonlocal seen
        if name in EVENTS and isinstance(arguments[0], str | os.PathLike) and str(folder) in str(arguments[0]):
            seen += 1
            if seen == event:
                act = threading.Thread(target=kill, args=(name, str(arguments[0])), daemon=True)
                act.start() if delay else kill(name, str(arguments[0]))

    sys.addaudithook(hook)


if __name__ == "__main__":
    main()
