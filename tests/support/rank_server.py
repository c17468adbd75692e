"""Forks the ranks of many short runs from one process that has imported everything. `forked_ranks.py` starts it.

Reads one job per line from stdin, as JSON. Answers each job with two lines: the process ids as soon as all ranks are
forked, and the end of the job. See `forked_ranks.start`.
"""

import faulthandler
import gc
import importlib
import importlib.util
import json
import os
import pkgutil
import resource
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path

from transformers import Qwen3ForCausalLM, Qwen3MoeForCausalLM  # noqa: F401 - these two import much more

import megatron_paint.cli
import megatron_paint.mcore.policy
import megatron_paint.training.inputs
import megatron_paint.training.start
from megatron_paint.config.load import load_settings
from megatron_paint.data.tokenizers import load_tokenizer
from tests.support.forks import end_after
from tests.support.shared_device import share_gloo_device

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart"
EVENTS = {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.truncate"}


def main() -> None:
    for command in pkgutil.iter_modules(megatron_paint.cli.__path__):
        importlib.import_module(f"megatron_paint.cli.{command.name}")
    load_settings(QUICKSTART / "paint.yaml")  # these two import what they need when they are first called
    load_tokenizer(QUICKSTART / "model")
    share_gloo_device()
    gc.collect()
    gc.freeze()  # the ranks' garbage collectors skip what is imported, and copy no page of it
    for line in sys.stdin:
        run(json.loads(line))


def run(job: dict) -> None:
    """Forks the processes of one job and waits for them. `hung`: the time was up, and they were killed."""
    pids: list[int] = []
    for rank in range(job["processes"]):
        pid = os.fork()
        if pid == 0:
            end_after(partial(rank_main, job, rank))
        pids.append(pid)
        if not job["alone"]:
            os.setpgid(pid, pids[0])
    print(json.dumps(pids), flush=True)
    ends: list[tuple[int, float] | None] = [None] * len(pids)
    deadline = time.monotonic() + job["limit"]
    while None in ends and time.monotonic() < deadline:
        for rank, pid in enumerate(pids):
            if ends[rank] is None:
                ends[rank] = ended(pid, os.WNOHANG)
        time.sleep(0.01)
    hung = None in ends
    for rank, pid in enumerate(pids):
        if ends[rank] is None:
            os.kill(pid, signal.SIGKILL)
            ends[rank] = ended(pid, 0)
    statuses, seconds = zip(*ends, strict=True)
    print(json.dumps({"statuses": statuses, "hung": hung, "cpu_seconds": sum(seconds)}), flush=True)


def ended(pid: int, options: int) -> tuple[int, float] | None:
    """Exit status and CPU seconds of a process and its children; None while it runs."""
    found, status, usage = os.wait4(pid, options)
    return (os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime) if found else None


def rank_main(job: dict, rank: int) -> None:
    """One process of the job."""
    if job["alone"]:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{job['folder']}/{name}{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    faulthandler.enable()
    faulthandler.dump_traceback_later(0.9 * job["limit"])  # shows where the process hangs
    os.environ |= {key: value.format(rank=rank) for key, value in job["environment"].items()}
    if (size := job["file_size"].get(str(rank))) is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    if job["kill"] is not None and rank == 0:
        kill_at_event(Path(job["kill"]["below"]), event=job["kill"]["event"], delay=job["kill"]["delay"])
    # A pool of this process imports the main module again: the command's, not this one, which imports everything.
    sys.modules["__main__"].__spec__ = importlib.util.find_spec("megatron_paint.__main__")
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
