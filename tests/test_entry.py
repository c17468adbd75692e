"""How the process of a command ends: its exit status, and what is finished before."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CODE = """
import atexit, threading, time
from concurrent.futures import ThreadPoolExecutor
import megatron_paint.cli.main
from megatron_paint.__main__ import run
def late():
    time.sleep(0.3)
    print("the thread is done")
def main():
    atexit.register(print, "registered")
    threading.Thread(target=late).start()
    ThreadPoolExecutor().submit(print, "results").result()  # its idle thread waits for more
    STATUS
megatron_paint.cli.main.main = main
run()
"""


def run(status, **options):
    code = CODE.replace("STATUS", status)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, text=True, timeout=60, **options)


def test_success_waits_for_threads_and_registered_functions():
    done = run("return 0", capture_output=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ["results", "the thread is done", "registered"]


@pytest.mark.parametrize(("status", "code"), [("return 3", 3), ("raise RuntimeError('a bug')", 1)])
def test_failure_ends_at_once(status, code):
    done = run(status, capture_output=True)
    assert (done.returncode, done.stdout) == (code, "results\n")
    assert ("RuntimeError: a bug" in done.stderr) == (code == 1)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_output_that_cannot_be_written_is_a_failure():
    with open("/dev/full", "w") as full:
        done = run("return 0", stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 120
    (line,) = done.stderr.splitlines()
    assert line.startswith("megatron-paint: error: the output cannot be written: ")
