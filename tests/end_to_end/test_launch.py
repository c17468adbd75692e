"""Starting and ending: what a group of ranks prints, once, and which processes are left.

The launcher is the real one. Most tests fork its ranks instead of starting a new Python for each; with `long` they are
started as a user starts them.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_paint.cli.main import main
from megatron_paint.objectives import Paint
from megatron_paint.run.folder import RunFolder
from megatron_paint.run.lock_watch import LOCK
from tests.support import forked_launcher, forked_ranks, tiny
from tests.support.ports import free_port
from tests.support.processes import children, is_pending, left_of_session, of_session
from tests.support.undisturbed import LAYOUT
from tests.support.until import until

ROOT = Path(__file__).parents[2]
LONG = ("run.steps=100000", "run.save_every=0", "evaluation.problems=null", "run.tensorboard=false")
WAYS = ["forked", pytest.param("started", marks=pytest.mark.long)]


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """The settings file of a tiny run on two ranks."""
    folder = tmp_path_factory.mktemp("launch")
    tiny.make_model(folder / "model")
    tiny.make_problems(folder / "problems.jsonl")
    return tiny.make_settings(folder, folder / "model", folder / "problems.jsonl", layout=LAYOUT)


class Forked:
    """A launcher that the fork server has forked, in a new session."""

    def __init__(self, folder, *arguments, target=forked_ranks.LAUNCHER):
        self._running = forked_ranks.start_command(folder, *arguments, target=target)
        self.pid = self._running.pid

    @property
    def is_alive(self):
        return self._running.is_alive

    def end(self):
        """(exit status, stdout, lines of stderr), when it has ended."""
        ended = self._running.wait()
        return ended.statuses[0], ended.out[0], ended.err[0].strip().splitlines()


class Started:
    """A command in a new Python and a new session."""

    def __init__(self, *command, path=ROOT):
        plain = {k: v for k, v in os.environ.items() if k not in forked_ranks.WORLD and not k.startswith("SLURM")}
        self._process = subprocess.Popen(
            [sys.executable, "-m", *map(str, command)],
            cwd=ROOT,
            env=plain | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(path), str(ROOT)])},
            start_new_session=True,
            # A test run that a shell has put in the background ignores SIGINT, and so would what it starts.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid

    @property
    def is_alive(self):
        return self._process.poll() is None

    def end(self):
        out, err = self._process.communicate(timeout=600)
        return self._process.returncode, out, err.strip().splitlines()


def rank_pid(launcher, rank):
    """Process id of a rank, which leads a process group."""
    return [pid for pid in children(launcher.pid) if os.getpgid(pid) == pid][rank]


@pytest.fixture
def running(request, settings, tmp_path):
    """(launcher of a long run that has done a step, its run folder)."""
    run = tmp_path / "run"
    arguments = ("train", settings, f"run.dir={run}", *LONG, "--processes", "2")
    launcher = Forked(tmp_path, *arguments) if request.param == "forked" else Started("megatron_paint", *arguments)
    deadline = time.monotonic() + 400
    while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text():
        assert launcher.is_alive, launcher.end()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    yield launcher, run
    for pid in of_session(launcher.pid):
        os.kill(pid, signal.SIGKILL)
    launcher.end()


linux = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in Linux's /proc")


@linux
@pytest.mark.parametrize("running", WAYS, indirect=True)
def test_control_c_stops_with_a_checkpoint(running):
    launcher, run = running
    os.killpg(launcher.pid, signal.SIGINT)
    status, out, (line,) = launcher.end()
    assert status == 75
    assert line.startswith("megatron-paint: SIGINT: the run stops after this step, with a checkpoint. Press Ctrl-C ag")
    (checkpoint,) = RunFolder(run).checkpoints()
    assert f"Stopped after step {checkpoint} by SIGINT; the same command with run.resume=auto" in out
    assert not left_of_session(launcher.pid)
    assert not (run / LOCK).exists()
    log = (run / "logs" / "console.log").read_text()
    assert log.count("==== ") == 1
    stopped = f"Stopped after step {checkpoint}"
    for text in ("layout ", "starting 2 ranks", "self-check: ", "step      1/100000 ", line, stopped):
        assert text in log


@linux
@pytest.mark.parametrize(
    ("running", "number"),
    [
        ("started", signal.SIGTERM),
        ("forked", signal.SIGUSR1),
        pytest.param("started", signal.SIGUSR1, marks=pytest.mark.long),
    ],
    indirect=["running"],
)
def test_a_signal_to_the_launcher_stops_all_with_a_checkpoint(running, number):
    launcher, run = running
    os.kill(launcher.pid, number)
    status, out, err = launcher.end()
    assert (status, err) == (75, [])
    (checkpoint,) = RunFolder(run).checkpoints()
    assert f"Stopped after step {checkpoint} by {number.name}; the same command with run.resume=auto" in out
    assert len(RunFolder(run).read_metrics()) == checkpoint
    assert not left_of_session(launcher.pid)


@linux
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("running", WAYS, indirect=True)
def test_a_second_signal_to_the_launcher_ends_all(running, number):
    launcher, run = running
    stopped = rank_pid(launcher, 1)
    os.kill(stopped, signal.SIGSTOP)  # so that the first has no end
    os.kill(launcher.pid, number)
    # Before the launcher has passed the first on, the system may make one signal of two.
    until(lambda: is_pending(stopped, number), seconds=60, otherwise=lambda: f"rank 1 got no {number.name}", every=0.05)
    assert launcher.is_alive
    os.kill(launcher.pid, number)
    status, _, err = launcher.end()
    kept = f"{run} has no checkpoint yet, so the same command with run.resume=auto begins it again"
    assert (status, err[-1]) == (128 + number, f"megatron-paint: ended by {number.name}; {kept}")
    assert len(err) == (2 if number == signal.SIGINT else 1)
    assert RunFolder(run).checkpoints() == []
    assert not left_of_session(launcher.pid)


@linux
@pytest.mark.parametrize("running", WAYS, indirect=True)
def test_a_killed_rank_is_named(running):
    launcher, _ = running
    os.kill(rank_pid(launcher, 1), signal.SIGKILL)
    status, _, err = launcher.end()
    assert status == 1
    assert len(err) == 1, err
    assert err[0].startswith(
        "megatron-paint: error: rank 1 died of SIGKILL (signal 9): most often the kernel's out-of-mem"
    )
    assert not left_of_session(launcher.pid)


@linux
@pytest.mark.parametrize("running", WAYS, indirect=True)
def test_ranks_end_with_a_killed_launcher(running):
    launcher, _ = running
    os.kill(launcher.pid, signal.SIGKILL)
    launcher.end()
    assert not left_of_session(launcher.pid)


@linux
@pytest.mark.parametrize("running", ["forked"], indirect=True)
def test_a_second_start_in_the_same_folder_is_refused(running, settings, capsys):
    """It takes nothing back of the run that lives, whose steps go on."""
    launcher, run = running
    before = (run / "metrics.jsonl").read_text()
    for mode in ([], ["--dry-run"]):
        arguments = ["train", str(settings), f"run.dir={run}", *LONG, "run.resume=auto", "--processes", "2", *mode]
        assert main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{run} is in use: process {launcher.pid} on " in line
    assert (run / "metrics.jsonl").read_text().startswith(before)
    assert launcher.is_alive


def with_a_bug_on_rank_1():
    """The launcher, one of whose ranks fails in its first step."""

    unspoilt = Paint.step

    def step(self, *values, **named):
        if os.environ["RANK"] == "1":
            raise RuntimeError("a bug on rank 1")
        return unspoilt(self, *values, **named)

    Paint.step = step
    forked_launcher.run()


BUG = """
import os, sys
if os.environ.get("RANK") == "1":
    from megatron_paint.objectives import Paint
    def step(self, *_, **__):
        raise RuntimeError("a bug on rank 1")
    Paint.step = step
"""


@linux
@pytest.mark.parametrize("way", WAYS)
def test_a_bug_prints_its_own_traceback_once(way, settings, tmp_path):
    arguments = ("train", settings, f"run.dir={tmp_path / 'run'}", *LONG, "--processes", "2")
    if way == "forked":
        launcher = Forked(tmp_path, *arguments, target="tests.end_to_end.test_launch:with_a_bug_on_rank_1")
    else:
        (tmp_path / "sitecustomize.py").write_text(BUG)
        launcher = Started("megatron_paint", *arguments, path=tmp_path)
    status, _, err = launcher.end()
    assert status == 1
    assert err[-1] == "RuntimeError: a bug on rank 1"
    assert sum("Traceback" in line for line in err) == 1, err
    assert not left_of_session(launcher.pid)


def torchrun(*arguments):
    """(exit status, stdout, lines of stderr) of torchrun itself."""
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "megatron_paint")
    return Started(*launcher, *arguments).end()


def srun(folder, *arguments, tasks=2):
    """Ranks with what srun sets: (exit statuses, stdouts together, lines of stderr together)."""
    step = {
        "SLURM_JOB_ID": "71",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": str(tasks),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_PROCID": "{rank}",
        "SLURM_LOCALID": "{rank}",
        "MASTER_PORT": str(free_port()),
    }
    ended = forked_ranks.run(folder, *arguments, processes=tasks, environment=step)
    return ended.statuses, "".join(ended.out), [line for text in ended.err for line in text.strip().splitlines()]


@pytest.mark.parametrize("way", WAYS)
def test_dry_run_inside_torchrun_only_checks(way, settings, tmp_path):
    arguments = ("train", settings, f"run.dir={tmp_path / 'run'}", "--dry-run")
    if way == "forked":
        ended = forked_ranks.run(tmp_path, *arguments)
        assert ended.statuses == [0, 0], ended
        out = "".join(ended.out)
    else:
        status, out, err = torchrun(*arguments)
        assert status == 0, err
    assert out.count("2 processes = tensor 2 x pipeline 1 x data 1") == 1
    assert out.count("8 training problems, 3 held-out problems") == 1
    assert not (tmp_path / "run").exists()


def test_training_joins_the_ranks_of_torchrun(settings, tmp_path):
    status, out, err = torchrun("train", settings, f"run.dir={tmp_path / 'run'}", "--self-check")
    assert status == 0, err
    assert out.count("2 processes = tensor 2 x pipeline 1 x data 1") == 1
    assert out.count("self-check: ") == 1


@pytest.mark.long
def test_an_error_inside_torchrun_is_one_line(settings):
    status, _, err = torchrun("train", settings, "optimizer.lrr=1")
    assert status == 1  # torchrun's own, whatever a rank's is
    line = "megatron-paint: error: unknown setting optimizer.lrr: did you mean optimizer.lr?"
    assert [text for text in err if "megatron-paint: " in text] == [line]


def test_dry_run_inside_srun_only_checks(settings, tmp_path):
    statuses, out, err = srun(tmp_path, "train", settings, f"run.dir={tmp_path / 'run'}", "--dry-run")
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
    statuses, _, err = srun(tmp_path, "train", settings, override, f"run.dir={tmp_path / 'run'}")
    assert statuses == [2, 2]
    assert len(err) == 1, err
    assert err[0].startswith("megatron-paint: error: ")
    assert says in err[0]


def test_training_joins_the_ranks_of_srun(settings, tmp_path):
    statuses, out, err = srun(tmp_path, "train", settings, f"run.dir={tmp_path / 'run'}", "--self-check")
    assert statuses == [0, 0], err
    assert out.count("2 processes = tensor 2 x pipeline 1 x data 1") == 1
    assert out.count("self-check: ") == 1
