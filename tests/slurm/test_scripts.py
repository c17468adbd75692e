"""Rendered scripts: equal to the golden ones, clean, and correct in their calls. Slurm's commands are stand-ins."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_paint.base.errors import UserError
from megatron_paint.cli.main import parse
from megatron_paint.config.settings import RunSettings
from megatron_paint.launch.slurm.options import make_options
from megatron_paint.launch.slurm.rendering import render
from megatron_paint.run.folder import RunFolder
from tests.slurm.fake_job import RECORD, FakeJob
from tests.slurm.scripts import (
    ENVIRON,
    EXAMPLE_NODES,
    EXAMPLES,
    GOLDEN,
    GOLDEN_CASES,
    REPOSITORY,
    example_script,
    golden_script,
    script,
)

SOURCES = (".ci", "benchmarks", "docs", "examples", "megatron_paint", "tests", "tools")
# In the folder of the Python of the tests, whose environment may be inactive.
SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}") or "shellcheck"
TRAIN = ["--nodes=2", "--gpus-per-node=2"]


@pytest.mark.parametrize("name", GOLDEN_CASES)
def test_golden(name):
    """`python -m tests.slurm.scripts` writes them again; read what changed."""
    assert golden_script(name) == (GOLDEN / f"{name}.sbatch").read_text()


def test_golden_folder_holds_nothing_else():
    assert {path.stem for path in GOLDEN.iterdir()} == set(GOLDEN_CASES)


@pytest.mark.parametrize("model", EXAMPLE_NODES)
def test_examples_are_what_the_command_prints(model):
    text = (EXAMPLES / f"{model}.sbatch").read_text()
    assert example_script(model) == text
    assert f"#SBATCH --nodes={EXAMPLE_NODES[model]}\n" in text


def shell_files() -> list[str]:
    """All golden scripts and examples, and every shell script of the project."""
    loose = [path for folder in SOURCES for path in (REPOSITORY / folder).rglob("*.sh")]
    scripts = [*GOLDEN.glob("*.sbatch"), *EXAMPLES.glob("*.sbatch")]
    return sorted(map(str, [*loose, *scripts]))


def test_shell_scripts_are_clean():
    files = shell_files()
    assert len(files) >= len(GOLDEN_CASES) + len(EXAMPLE_NODES)
    for file in files:
        subprocess.run(["bash", "-n", file], check=True)
    done = subprocess.run([SHELLCHECK, *files], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_shellcheck_would_complain(tmp_path):
    """The check above can fail."""
    (tmp_path / "x.sh").write_text("#!/bin/bash\necho $1\n")
    assert subprocess.run([SHELLCHECK, str(tmp_path / "x.sh")], capture_output=True).returncode == 1


def test_values_of_variables_are_nowhere():
    for name in GOLDEN_CASES:
        text = golden_script(name)
        assert not [value for value in ENVIRON.values() if value in text]
    assert "#SBATCH --export=HF_TOKEN,WANDB_API_KEY\n" in golden_script("env")
    assert "#SBATCH --export=NIL\n" in golden_script("plain")


NASTY = """a  b; it's "so" $(touch pwned)`touch pwned`; touch pwned & | > pwned < * ? ~ # !x \\ ${HOME}"""


def test_comments_are_one_line():
    """bash would run what follows a line break."""
    given = parse(["launch", "slurm", "paint.yaml", *TRAIN, "--venv=.venv"])
    options = make_options(given, run=RunSettings(dir="runs/paint"), environ=ENVIRON)
    of_run = {"settings_file": "paint.yaml", "overrides": [], "run_dir": "runs/paint"}
    text = render(options, **of_run, title="a\ntouch title", plan=["step  é", "model  b\ntouch plan\r\x1b"])
    assert [line for line in text.splitlines() if "touch" in line or "é" in line] == [
        r"# a\ntouch title on 2 x 2 processes, written by `megatron-paint launch slurm`; see docs/slurm.md.",
        *("# step  é", r"# model  b\ntouch plan\r\x1b"),
    ]


@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_values_reach_training_as_they_are(tmp_path, launcher):
    run = "runs/" + NASTY.translate(str.maketrans("", "", '"\\%/')).replace("..", "")
    python, settings, override = f"py {NASTY}/python", f"conf {NASTY}/s.yaml", f"model.hf_path={NASTY}"
    fake = FakeJob(tmp_path, run=run, python=python)
    text = script(*TRAIN, f"--launcher={launcher}", f"--python={python}", override, run_dir=run, settings=settings)
    status, output = fake.job(text, "checkpoint=25 exit=1")
    assert status == 0, output
    preflight, train = fake.called("python")
    expected = ["-m", "megatron_paint.launch.preflight", "--run", run, "--rendezvous", "n1:27340", "--expect-gpus=2"]
    expected += ["--exclude-bad", f"{run}/logs/bad_nodes"]
    assert preflight == [*expected, "--settings", settings, override, "run.resume=auto"]
    assert train[-5:] == ["megatron_paint", "train", settings, override, "run.resume=auto"]
    assert not list(tmp_path.rglob("pwned"))
    assert (fake.run / "logs" / "1234-0").is_dir()
    assert fake.called("scontrol")[-1] == ["requeue", "1234"]


def test_nasty_containers_and_mounts(tmp_path):
    image, mount = """im age's "$(touch pwned)`id`.sif""", """/d a's"$(touch pwned):/data"""
    for runtime in ("pyxis", "apptainer"):
        fake = FakeJob(tmp_path / runtime)
        fake.executable(fake.fakes / "apptainer", f'#!/bin/bash\n{RECORD}while [ "$1" != bash ]; do shift; done\n"$@"')
        inside = [f"--container={image}", f"--container-runtime={runtime}", "--container-python=.venv/bin/python"]
        text = script(*TRAIN, *inside, f"--mount={mount}", "--no-preflight")
        fake.job(text, "exit=1")
        (flags,) = fake.called("srun")
        if runtime == "pyxis":
            here = fake.folder
            assert f"--container-image={image}" in flags
            assert f"--container-mounts={here}:{here},{mount}" in flags
        else:
            (called,) = fake.called("apptainer")
            assert called[:5] == ["exec", "--nv", "--bind", str(fake.folder), "--pwd"]
            assert called[6:9] == ["--bind", mount, image]
    assert not list(tmp_path.rglob("pwned"))


def test_torchrun_call(tmp_path):
    fake = FakeJob(tmp_path)
    status, output = fake.job(script(*TRAIN, "--max-restarts=3"), "checkpoint=25 exit=1")
    assert status == 0
    assert "attempt: go from step 0\n" in output
    assert "attempt: next exit status 1, step 25: a newer checkpoint was written\n" in output
    (_, train) = fake.called("python")
    assert train == [
        *["-u", "-m", "torch.distributed.run", "--log-dir=runs/paint/logs/1234-0/node_0", "--nnodes=2"],
        *["--nproc-per-node=2", "--max-restarts=3", "--rdzv-backend=c10d", "--rdzv-endpoint=n1:27340"],
        *["--rdzv-id=1234-0", "--tee=3", "--local-ranks-filter=0"],
        *["-m", "megatron_paint", "train", "paint.yaml", "run.resume=auto"],
    ]
    preflight, step = fake.called("srun")
    flags = [
        "--nodes=2",
        "--export=ALL",
        "--kill-on-bad-exit=1",
        "--cpu-bind=none",
        "--ntasks=2",
        "--ntasks-per-node=1",
    ]
    assert (preflight[:6], step[:6]) == (flags, flags)
    assert (preflight[6], "--kill-on-bad-exit=0" in step) == ("--kill-on-bad-exit=0", False)


def test_srun_call_and_files_of_ranks(tmp_path):
    """Rank 0 writes to the console and to its file, the others to theirs alone; the exit status is training's."""
    fake = FakeJob(tmp_path)
    text = script(*TRAIN, "--launcher=srun", "--no-preflight")
    status, output = fake.job(text, "take=0 exit=75")
    assert (status, output.count("hello from training")) == (0, 1)
    assert (fake.run / "logs" / "1234-0" / "rank_0.log").read_text() == "hello from training no token\n"
    assert [record["status"] for record in RunFolder(fake.run).read_attempts() if record["event"] == "end"] == [75]
    (step,) = fake.called("srun")
    assert step[4:6] == ["--ntasks=4", "--ntasks-per-node=2"]
    srun = fake.fakes / "srun"
    srun.write_text(srun.read_text().replace("SLURM_PROCID=0", "SLURM_PROCID=3"))
    status, output = fake.job(text, "exit=1")
    assert "hello" not in output
    assert (fake.run / "logs" / "1234-1" / "rank_3.log").read_text() == "hello from training no token\n"


def test_a_second_attempt_without_a_checkpoint_stops_the_run(tmp_path):
    fake = FakeJob(tmp_path)
    text = script(*TRAIN, "--no-preflight", "--job-name=my.run")
    assert fake.job(text, "exit=1")[0] == 0
    assert fake.called("scontrol")[-1] == ["requeue", "1234"]
    jobs = {"WAITING": "1235\n1236\n", "OTHERS": "77\n78\n"}  # 77 and 78 may have the same name
    status, output = fake.job(text, "exit=1", **jobs)
    reason = "2 attempts in a row ended without a checkpoint newer than step 0, the last one with exit status 1"
    assert (status, f"attempt: stop {reason}\n" in output) == (1, True)
    assert (fake.run / "STOPPED").read_text() == f"{reason}\n"
    assert [call[0] for call in fake.called("scontrol")] == ["show", "show", "requeue", "show"]
    assert fake.called("scancel") == [["--state=PENDING", "1235", "1236"]]
    trained = len(fake.called("python"))
    status, output = fake.job(text, "exit=0")  # a job that was queued already
    assert (status, f"attempt: stop {reason}\n" in output, len(fake.called("python"))) == (1, True, trained)


def test_a_finished_run_cancels_what_is_queued(tmp_path):
    fake = FakeJob(tmp_path)
    fake.configure()
    status, output = fake.job(
        script(*TRAIN, "--attempts=3"), "checkpoint=100 export=100 exit=0", WAITING="1235\n", OTHERS="77\n"
    )
    assert (status, "attempt: done all 100 steps, and everything that was due after them\n" in output) == (0, True)
    assert fake.called("scancel") == [["--state=PENDING", "1235"]]
    assert "requeue" not in [call[0] for call in fake.called("scontrol")]
    status, output = fake.job(script(*TRAIN, "--attempts=3"), "exit=1")
    assert (status, "attempt: done" in output) == (0, True)
    assert len(fake.called("srun")) == 2  # preflight and training of the first


def test_a_job_of_a_chain_leaves_the_run_to_the_next_job(tmp_path):
    fake = FakeJob(tmp_path)
    status, output = fake.job(script(*TRAIN, "--attempts=3"), "checkpoint=50 exit=0")
    assert (status, "attempt: next exit status 0, step 50" in output) == (0, True)
    assert [call[0] for call in fake.called("scontrol")] == ["show"]
    assert not fake.called("scancel")


def test_one_job_of_a_run_at_a_time():
    for attempts in ("1", "3"):
        assert "#SBATCH --dependency=singleton\n" in script(*TRAIN, f"--attempts={attempts}")


@pytest.mark.parametrize(
    "line",
    [
        *("--dependency=afterok:7 --kill-on-invalid-dep=yes", "--dependency  afterok:7", "--depend=afterok:7"),
        *("--dependency=afterok:7?afterok:8", "--nice=3 -d afterok:7"),
    ],
)
def test_a_dependency_that_would_take_the_place_of_the_jobs_own_is_refused(line):
    with pytest.raises(UserError, match="give a dependency as one line"):
        script(*TRAIN, f"--sbatch={line}")


@pytest.mark.parametrize("line", ["--dependency=afterok:7", "--dependency afterok:7", "-d afterok:7"])
def test_a_dependency_of_the_users_holds_as_well(line):
    text = script(*TRAIN, f"--sbatch={line}", "--sbatch=--nice")
    assert [line for line in text.splitlines() if "dependency" in line or "afterok" in line] == [
        "#SBATCH --dependency=singleton,afterok:7"
    ]
    assert "#SBATCH --nice\n" in text


def test_a_later_launch_of_the_run_resumes_it(tmp_path):
    """Its job waits for this one, which would run first again if it were requeued."""
    fake = FakeJob(tmp_path)
    status, output = fake.job(script(*TRAIN), "exit=0", PREFLIGHT="3", BAD_NODES="n2\n", WAITING="1235\n")
    assert (status, "the next job of this run resumes" in output) == (0, True), output
    assert [call for call in fake.called("scontrol") if call[0] in ("requeue", "update")] == [
        ["update", "JobId=1235", "ExcNodeList=n2"]
    ]


@pytest.mark.parametrize(("preflight", "ends"), [("3", 0), ("2", 1)])
def test_nothing_is_trained_where_the_preflight_fails(tmp_path, preflight, ends):
    fake = FakeJob(tmp_path)
    status, output = fake.job(script(*TRAIN), "exit=0", PREFLIGHT=preflight)
    assert (status, len(fake.called("srun"))) == (ends, 1)
    assert "hello" not in output
    assert [record["status"] for record in RunFolder(fake.run).read_attempts() if record["event"] == "end"] == [
        int(preflight)
    ]


@pytest.mark.parametrize(("stays_off", "excluded"), [("(null)", "n2,n5"), ("n[7-8]", "n[7-8],n2,n5")])
def test_bad_nodes_are_left_out_from_the_requeue_on(tmp_path, stays_off, excluded):
    """Beside those that the job was to stay off before, and only after the requeue, as Slurm has it."""
    fake = FakeJob(tmp_path)
    status, output = fake.job(script(*TRAIN), "exit=0", PREFLIGHT="3", BAD_NODES="n2\nn5\n", STAYS_OFF=stays_off)
    assert (status, "job 1234 avoids nodes: n2,n5\n" in output) == (0, True), output
    requeue, _, update = fake.called("scontrol")[2:]
    assert (requeue, update) == (["requeue", "1234"], ["update", "JobId=1234", f"ExcNodeList={excluded}"])


def test_attempts_that_name_new_bad_nodes_are_not_idle(tmp_path):
    fake = FakeJob(tmp_path)
    fake.job(script(*TRAIN), "exit=1")
    for named, ends, said in (
        *(("n2\nn5\n", 0, "newly named bad nodes: n2, n5"), ("n1\nn5\n", 0, "newly named bad nodes: n1")),
        ("n2\n", 1, "2 attempts in a row ended without a checkpoint newer than step 0"),
    ):
        status, output = fake.job(script(*TRAIN), "exit=0", PREFLIGHT="3", BAD_NODES=named)
        assert status == ends
        assert said in output


def test_a_controller_that_is_away_is_waited_for(tmp_path):
    fake = FakeJob(tmp_path)
    (fake.fakes / "away").touch()
    status, output = fake.job(script(*TRAIN, "--no-preflight"), "exit=1")
    assert (status, "Unable to contact slurm controller" in output) == (0, True)
    assert fake.called("sleep") == [["10"]]
    assert [call[0] for call in fake.called("scontrol")] == ["show", "show", "show", "requeue"]


def test_a_job_that_runs_elsewhere_meanwhile_is_not_requeued(tmp_path):
    fake = FakeJob(tmp_path)
    status, output = fake.job(script(*TRAIN), "exit=1", RESTARTS="1")
    assert (status, "already restarted this job elsewhere" in output) == (143, True)
    assert "requeue" not in [call[0] for call in fake.called("scontrol")]


def test_bad_nodes_are_left_out_by_the_rest_of_a_chain(tmp_path):
    fake = FakeJob(tmp_path)
    text = script(*TRAIN, "--attempts=3")
    status, output = fake.job(text, "exit=0", PREFLIGHT="3", BAD_NODES="n2\n", WAITING="1235\n1236\n")
    assert status == 0, output
    updates = [call[1:] for call in fake.called("scontrol") if call[0] == "update"]
    assert updates == [[f"JobId={job}", "ExcNodeList=n2"] for job in (1235, 1236)]
    (fake.fakes / "away").touch()  # a controller that does not answer when it is asked about the first of them
    status, output = fake.job(text, "exit=0", PREFLIGHT="3", BAD_NODES="n3\n", WAITING="1235\n1236\n")
    assert (status, "job 1235 avoids" in output, "job 1236 avoids nodes: n3\n" in output) == (0, False, True), output


def wait_until(condition, job: subprocess.Popen) -> None:
    """Waits for a condition while the job runs."""
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.02)


def signalled(
    fake: FakeJob, text: str, training: str, *signals: signal.Signals, deaf: bool = False, **environ: str
) -> tuple[int, str]:
    """Sends signals to the script once training listens.

    deaf: sends them when training has started, which listens only after the script has begun to repeat them.
    """
    job = fake.start(text, training, **environ, **({"DEAF": "1"} if deaf else {}))
    wait_until((fake.fakes / ("started" if deaf else "listening")).exists, job)
    for number in signals:
        job.send_signal(number)
        time.sleep(0.1)
    if deaf:
        wait_until(lambda: fake.called("sleep"), job)
        (fake.fakes / "listen").touch()
    output, _ = job.communicate(timeout=600)
    return job.returncode, output


@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_the_checkpoint_is_awaited_before_the_requeue(tmp_path, launcher):
    fake = FakeJob(tmp_path)
    text = script(*TRAIN, f"--launcher={launcher}", "--no-preflight")
    training = "until_told take=0.7 checkpoint=7 take=0.3 exit=75"
    status, output = signalled(fake, text, training, signal.SIGUSR1, signal.SIGUSR1)
    assert (status, "attempt: next exit status 75, step 7: a newer checkpoint" in output) == (0, True), output
    order = [call[:2] for call in fake.calls() if call[0] in ("checkpoint", "scontrol")]
    assert order == [["scontrol", "show"], ["checkpoint"], ["scontrol", "show"], ["scontrol", "requeue"]]


def test_a_cancelled_job_is_not_requeued(tmp_path):
    """TERM too requests a checkpoint, but a cancelled job must not come back."""
    fake = FakeJob(tmp_path)
    training = "until_told take=0.3 checkpoint=7 exit=0"
    status, output = signalled(fake, script(*TRAIN, "--no-preflight"), training, signal.SIGTERM)
    assert (status, "ended by TERM: not requeued\n" in output) == (143, True)
    assert "attempt: next exit status 0, step 7" in output
    assert [call[0] for call in fake.called("scontrol")] == ["show", "show"]


def test_a_preempted_job_that_ends_within_its_grace_time_is_requeued(tmp_path):
    """Slurm would treat it as failed."""
    training = "until_told take=0.3 checkpoint=7 exit=0"
    text = script(*TRAIN, "--no-preflight")
    for state, ends in (("RUNNING", 0), ("CANCELLED", 143)):
        fake = FakeJob(tmp_path / state)
        preempted = {"STATE": state, "PREEMPTED": "2026-11-28T12:00:00"}
        status, output = signalled(fake, text, training, signal.SIGTERM, **preempted)
        assert (status, "ended by TERM: not requeued\n" in output) == (ends, ends != 0), output
        assert (fake.called("scontrol")[-1] == ["requeue", "1234"]) == (ends == 0)


@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_ranks_that_do_not_listen_yet_are_signalled_again(tmp_path, launcher):
    fake = FakeJob(tmp_path)
    text = script(*TRAIN, f"--launcher={launcher}", "--no-preflight")
    training = "until_told checkpoint=7 exit=0"
    status, output = signalled(fake, text, training, signal.SIGUSR1, deaf=True)
    assert (status, "attempt: next exit status 0, step 7" in output) == (0, True), output
    assert set(map(tuple, fake.called("sleep"))) == {("15",)}
