"""Starting and ending: what a world of ranks says, once, and what is left of it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_paint.run.folder import RunFolder
from tests.support import tiny
from tests.support.ports import free_port

ROOT = Path(__file__).parents[2]
LAYOUT = "tensor_model_parallel_size: 2, sequence_parallel: true"
LONG = ("run.steps=100000", "run.save_every=0", "evaluation.problems=null", "run.tensorboard=false")
MARK = "MEGATRON_PAINT_TEST_RUN"  # in the environment of every process of a test's run
WORLD = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """The settings file of a tiny run on two ranks."""
    folder = tmp_path_factory.mktemp("launch")
    tiny.make_model(folder / "model")
    tiny.make_problems(folder / "problems.jsonl")
    return tiny.make_settings(folder, folder / "model", folder / "problems.jsonl", layout=LAYOUT)


def environment(mark, **more):
    plain = {name: value for name, value in os.environ.items() if name not in WORLD and "SLURM" not in name}
    path = os.pathsep.join([str(more.pop("path", ROOT)), str(ROOT)])
    return plain | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, MARK: str(mark)} | more


def start(*command, env):
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, command)],
        cwd=ROOT,
        env=env,
        start_new_session=True,
        # A test run that a shell has put behind ignores SIGINT, and so would what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process):
    """(exit status, stdout, lines of stderr) of a process that is about to end."""
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err.strip().splitlines()


def left(mark, *, seconds=30.0):
    """Processes of the test's run that are still there after a while, which a grading worker may take to end."""
    deadline = time.monotonic() + seconds
    while (found := _processes(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def _processes(mark):
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}\0".encode() in (folder / "environ").read_bytes() + b"\0":
                found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
    return found


def rank_pid(mark, rank):
    """The process id of one rank of the local launcher."""
    for pid in _processes(mark):
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        if f"RANK={rank}".encode() in variables and b"megatron_paint\0train" in command:
            return pid
    raise AssertionError(f"no rank {rank}")


@pytest.fixture
def running(settings, tmp_path):
    """(launcher of a long run that has done a step, mark of its processes)."""
    run = tmp_path / "run"
    arguments = ("train", settings, f"run.dir={run}", *LONG, "--processes", "2")
    process = start("megatron_paint", *arguments, env=environment(run))
    deadline = time.monotonic() + 400
    while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    yield process, run
    for pid in _processes(run):
        os.kill(pid, signal.SIGKILL)
    process.communicate()


linux = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in Linux's /proc")


@linux
def test_control_c_ends_quietly(running):
    process, mark = running
    os.killpg(process.pid, signal.SIGINT)
    status, _, err = end(process)
    assert (status, err) == (130, ["megatron-paint: ended by SIGINT"])
    assert not left(mark)


@linux
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_the_launcher_stops_all_with_a_checkpoint(running, number):
    process, run = running
    os.kill(process.pid, number)
    status, out, err = end(process)
    assert (status, err) == (75, [])
    (checkpoint,) = RunFolder(run).checkpoints()
    assert f"Stopped after step {checkpoint} by {number.name}; the same command with run.resume=auto" in out
    assert len(RunFolder(run).read_metrics()) == checkpoint
    assert not left(run)


@linux
def test_a_second_signal_to_the_launcher_ends_all(running):
    process, mark = running
    os.kill(rank_pid(mark, 1), signal.SIGSTOP)  # so that the first has no end
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(1.0)
    assert process.poll() is None
    os.kill(process.pid, signal.SIGTERM)
    status, _, err = end(process)
    assert (status, err) == (143, ["megatron-paint: ended by SIGTERM"])
    assert RunFolder(mark).checkpoints() == []
    assert not left(mark)


@linux
def test_a_killed_rank_is_named(running):
    process, mark = running
    os.kill(rank_pid(mark, 1), signal.SIGKILL)
    status, _, err = end(process)
    assert status == 1
    assert len(err) == 1, err
    assert err[0].startswith(
        "megatron-paint: error: rank 1 died of SIGKILL (signal 9): most often the kernel's out-of-mem"
    )
    assert not left(mark)


@linux
def test_ranks_end_with_a_killed_launcher(running):
    process, mark = running
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not left(mark)


BUG = """
import os, sys
if os.environ.get("RANK") == "1":
    from megatron_paint.objectives import Paint
    def step(self, *_, **__):
        raise RuntimeError("a bug on rank 1")
    Paint.step = step
"""


@linux
def test_a_bug_prints_its_own_traceback_once(settings, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(BUG)
    run = tmp_path / "run"
    arguments = ("train", settings, f"run.dir={run}", *LONG, "--processes", "2")
    status, _, err = end(start("megatron_paint", *arguments, env=environment(run, path=tmp_path)))
    assert status == 1
    assert err[-1] == "RuntimeError: a bug on rank 1"
    assert sum("Traceback" in line for line in err) == 1, err
    assert not left(run)


def torchrun(*arguments, mark):
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "megatron_paint")
    return end(start(*launcher, *arguments, env=environment(mark)))


def srun(*arguments, mark, tasks=2):
    """What srun would start: (exit statuses, stdouts together, lines of stderr together)."""
    step = {
        "SLURM_JOB_ID": "71",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": str(tasks),
        "SLURM_STEP_NODELIST": "localhost",
        "MASTER_PORT": str(free_port()),
    }
    started = [
        start(
            "megatron_paint",
            *arguments,
            env=environment(mark, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank), **step),
        )
        for rank in range(tasks)
    ]
    ends = [end(process) for process in started]
    return [e[0] for e in ends], "".join(e[1] for e in ends), [line for e in ends for line in e[2]]


def test_dry_run_inside_torchrun_only_checks(settings, tmp_path):
    status, out, err = torchrun("train", settings, f"run.dir={tmp_path / 'run'}", "--dry-run", mark=tmp_path)
    assert status == 0, err
    assert out.count("2 processes = tensor 2 x pipeline 1 x data 1") == 1
    assert out.count("8 training problems, 3 held-out problems") == 1
    assert not (tmp_path / "run").exists()


def test_an_error_inside_torchrun_is_one_line(settings, tmp_path):
    status, _, err = torchrun("train", settings, "optimizer.lrr=1", mark=tmp_path)
    assert status == 1  # torchrun's own, whatever a rank's is
    line = "megatron-paint: error: unknown setting optimizer.lrr: did you mean optimizer.lr?"
    assert [text for text in err if "megatron-paint: " in text] == [line]


def test_dry_run_inside_srun_only_checks(settings, tmp_path):
    statuses, out, err = srun("train", settings, f"run.dir={tmp_path / 'run'}", "--dry-run", mark=tmp_path)
    assert (statuses, err) == ([0, 0], [])
    assert out.count("2 processes = tensor 2 x pipeline 1 x data 1") == 1
    assert not (tmp_path / "run").exists()


ERRORS = {
    "found by every rank before it joins": ("optimizer.lrr=1", "unknown setting optimizer.lrr"),
    "found by rank 0 for all": ("data.train=nowhere.jsonl", "there is no file nowhere.jsonl"),
}


@pytest.mark.parametrize("when", ERRORS)
def test_an_error_inside_srun_is_one_line(settings, tmp_path, when):
    override, says = ERRORS[when]
    statuses, _, err = srun("train", settings, override, f"run.dir={tmp_path / 'run'}", mark=tmp_path)
    assert statuses == [2, 2]
    assert len(err) == 1, err
    assert err[0].startswith("megatron-paint: error: ")
    assert says in err[0]


def test_training_joins_the_world_of_srun(settings, tmp_path):
    statuses, out, err = srun("train", settings, f"run.dir={tmp_path / 'run'}", "--self-check", mark=tmp_path)
    assert statuses == [0, 0], err
    assert out.count("2 processes = tensor 2 x pipeline 1 x data 1") == 1
    assert out.count("self-check: ") == 1
