"""A guarded command ends with the process that started it, with its own children and their shared memory."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from megatron_paint.runtime import guard
from tests.support.until import until

# A command with a child; both hold a piece of Python's shared memory, and ignore SIGTERM.
COMMAND = """
import os, signal, sys, time
from multiprocessing.shared_memory import SharedMemory
signal.signal(signal.SIGTERM, signal.SIG_IGN)
memory = SharedMemory(create=True, size=1000)
if os.fork() == 0:
    open(sys.argv[1] + "/child", "w").write(f"{os.getpid()} {memory.name}")
time.sleep(600)
"""
STARTS = """
import os, subprocess, sys, time
command = [sys.executable, "-m", "megatron_paint.runtime.guard", str(os.getpid()), *sys.argv[1:]]
subprocess.Popen(command, stdin=subprocess.PIPE)
time.sleep(600)
"""


STAYS, KEPT_OPEN = os.pipe()  # a standard input that nobody closes


def child_of(folder: Path) -> tuple[int, Path]:
    until(
        lambda: (folder / "child").exists() and (folder / "child").read_text().count(" ") == 1, seconds=60, every=0.02
    )
    pid, name = (folder / "child").read_text().split()
    assert Path("/dev/shm", name).exists()
    return int(pid), Path("/dev/shm", name)


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_the_parent_is_killed(tmp_path):
    removed = tmp_path / "removed"
    removed.mkdir()
    (removed / "file").touch()
    parent = subprocess.Popen([sys.executable, "-c", STARTS, removed, sys.executable, "-c", COMMAND, tmp_path])
    pid, memory = child_of(tmp_path)
    parent.kill()
    parent.wait()
    until(lambda: is_gone(pid) and not memory.exists() and not removed.exists(), seconds=60, every=0.02)


def test_the_parent_ends_it(tmp_path):
    """A suspended process is killed too. The folder is the parent's to remove."""
    kept = tmp_path / "kept"
    kept.mkdir()
    command = [sys.executable, "-m", guard.__name__, str(os.getpid()), kept, sys.executable, "-c", COMMAND, tmp_path]
    process = subprocess.Popen(command, stdin=subprocess.PIPE)
    pid, memory = child_of(tmp_path)
    os.kill(pid, signal.SIGSTOP)
    process.stdin.close()
    assert process.wait(60) == 128 + signal.SIGKILL
    until(lambda: is_gone(pid), seconds=60, every=0.02)
    assert not memory.exists()
    assert kept.exists()


def test_signals_to_a_job_end_neither(tmp_path):
    """A batch system sends them to all processes of the job. The child has the handling that it inherits."""
    asleep = "import os, sys, time; open(sys.argv[1] + '/pid', 'w').write(str(os.getpid())); time.sleep(600)"
    command = [sys.executable, "-m", guard.__name__, str(os.getpid()), "", sys.executable, "-c", asleep, tmp_path]
    process = subprocess.Popen(command, stdin=subprocess.PIPE)
    until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text(), seconds=60, every=0.02)
    pid = int((tmp_path / "pid").read_text())
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
        os.kill(process.pid, number)
        os.kill(pid, number)
    time.sleep(0.5)
    assert process.poll() is None
    assert not is_gone(pid)
    process.stdin.close()
    process.wait(60)
    until(lambda: is_gone(pid), seconds=60, every=0.02)


def test_the_command_has_its_own_environment(tmp_path):
    write = "import os, sys; open(sys.argv[1] + '/env', 'w').write(repr(dict(os.environ)))"
    command = [sys.executable, "-m", guard.__name__, str(os.getpid()), "", sys.executable, "-c", write, tmp_path]
    own = {"ONLY": "this", "LC_ALL": "C"}
    assert subprocess.run(command, env=os.environ | {guard.ENVIRONMENT: json.dumps(own)}, stdin=STAYS).returncode == 0
    assert eval((tmp_path / "env").read_text()) == own


def test_its_status_is_that_of_the_command():
    command = [sys.executable, "-m", guard.__name__, str(os.getpid()), "", sys.executable, "-c", "exit(7)"]
    assert subprocess.run(command, stdin=STAYS).returncode == 7


def test_a_parent_that_died_before():
    command = [sys.executable, "-m", guard.__name__, "1", "", sys.executable, "-c", "import time; time.sleep(600)"]
    assert subprocess.run(command, stdin=STAYS, timeout=60).returncode == 128 + signal.SIGKILL
