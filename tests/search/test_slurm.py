"""`megatron-paint launch search`: the scripts of the workers, what is submitted, and how a job of a worker ends."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_paint.base.errors import UserError
from megatron_paint.cli.main import main, parse
from megatron_paint.config.load import load_settings
from megatron_paint.search.folder import SEARCH
from megatron_paint.search.slurm import _options, worker_script
from megatron_paint.search.space import read_space
from tests.search.spaces import ROOT, SETTINGS, given, write_space
from tests.slurm.fake_job import FakeJob
from tests.support.until import until

CPU = ["--gpus-per-node=0", "--jobs=2", "--time=2:00:00", "--account=team"]
SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}") or "shellcheck"


def script(*arguments: str, worker: int = 1) -> str:
    options = parse(["launch", "search", "paint.yaml", "space.yaml", "--venv=.venv", *CPU, *arguments])
    out = Path("runs/a search")
    return worker_script(options, _options(options, given(), out), out, worker)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The examples' folder as the current one, and stand-ins for Slurm's commands."""
    fakes = {"sbatch": 'printf "%s\\n" "$*" >> "$CALLS"\necho "$((100 + $(wc -l < "$CALLS")));cluster"\n'}
    for name, text in fakes.items():
        FakeJob.executable(tmp_path / "bin" / name, f"#!/bin/bash\n{text}")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.chdir(ROOT)
    return tmp_path


def test_the_script(tmp_path):
    text = script("--trials=7", "--workers=3", worker=2)
    assert text.startswith("#!/bin/bash -l\n# paint.yaml: worker 2 of 3 of a search of 7 trials, written by")
    for line in (
        "--job-name=runs-a_search-2",
        "--time=2:00:00",
        "--account=team",
        "--nodes=1",
        "--ntasks-per-node=1",
        '--output="runs/a search/logs/%j.out"',
        "--signal=B:USR1@300",
        "--dependency=singleton",
        "--export=NIL",
    ):
        assert f"#SBATCH {line}\n" in text
    assert (
        ".venv/bin/python -u -m megatron_paint search 'runs/a search/logs/settings.yaml' "
        "'runs/a search/logs/space.yaml' --trials 7 --jobs 2 --seed 1 --out 'runs/a search' &\n"
    ) in text
    (tmp_path / "job.sbatch").write_text(text)
    checked = subprocess.run([SHELLCHECK, str(tmp_path / "job.sbatch")], capture_output=True, text=True)
    assert (checked.returncode, checked.stdout) == (0, "")


def test_a_container():
    with pytest.raises(UserError, match="pyxis needs srun: give --container-runtime=apptainer"):
        script("--container=image.sif")
    text = script("--container=image.sif", "--container-runtime=apptainer", "--env=HOME")
    assert 'apptainer exec --bind "$PWD" --pwd "$PWD" image.sif python3 -u -m megatron_paint search ' in text


@pytest.mark.parametrize(
    ("training", "status", "cancels", "line"),
    [
        ("exit=0", 0, True, "search: nothing is left for this worker"),
        ("exit=75", 0, False, "search: stopped with checkpoints; the next job of this worker continues"),
        ("exit=2", 2, True, "search: exit status 2: the other jobs of this worker are cancelled"),
        ("exit=137", 137, False, "search: exit status 137: the next job of this worker resumes the trials"),
    ],
)
def test_the_end_of_a_job(tmp_path, training, status, cancels, line):
    job = FakeJob(tmp_path)
    ended, output = job.job(script(), training, WAITING="1235\n", OTHERS="77\n")
    assert (ended, output.count(line)) == (status, 1), output
    calls = (job.fakes / "calls").read_bytes().decode()
    assert ("scancel\0--state=PENDING\0001235\0" in calls) == cancels
    assert "77" not in calls.partition("scancel")[2]


def test_the_signal_before_the_time_limit_reaches_the_search(tmp_path):
    job = FakeJob(tmp_path)
    running = job.start(script(), "until_told exit=75")
    until((job.fakes / "listening").exists, seconds=60, otherwise=lambda: "the search does not listen", every=0.02)
    running.send_signal(signal.SIGUSR1)
    output, _ = running.communicate(timeout=60)
    assert running.returncode == 0, output
    assert "search: stopped with checkpoints" in output


def test_submission(place, capsys):
    out = place / "out"
    space = write_space(place)
    arguments = [
        "launch",
        "search",
        str(SETTINGS),
        str(space),
        "optimizer.lr=2e-3",
        *CPU,
        "--workers=2",
        "--attempts=3",
    ]
    assert main([*arguments, f"--out={out}", "--dry-run"]) == 0
    assert not out.exists()
    printed = capsys.readouterr().out
    assert printed.count("#!/bin/bash -l") == 2
    assert printed.count("# sbatch --parsable ") == 6
    assert main([*arguments, f"--out={out}"]) == 0
    files = [out / "logs" / f"worker_{worker}.sbatch" for worker in (1, 2)]
    assert (place / "calls").read_text() == "".join(f"--parsable {file}\n" * 3 for file in files)
    assert "submitted  101, 102, 103, 104, 105, 106; console " in capsys.readouterr().out
    settings = load_settings(out / "logs" / "settings.yaml")
    assert settings == given("optimizer.lr=2e-3")
    copied = read_space(out / "logs" / "space.yaml", settings)
    assert copied.parameters == read_space(space, settings).parameters
    assert (out / SEARCH).exists()
    # The command of a job is accepted as the same search.
    command = ["search", str(out / "logs/settings.yaml"), str(out / "logs/space.yaml"), f"--out={out}", "--report-only"]
    assert main(command) == 0
    assert "No trial is complete yet." in (out / "report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus-per-node=4", "--jobs=8"], "--jobs=8 is above --gpus-per-node=4"),
        (["--gpus-per-node=4", "--processes=3"], "--processes=3 is above the number of GPUs of a trial, 2"),
        (["--processes=3", "megatron.tensor_model_parallel_size=2"], "3 processes cannot be laid out as tensor_model_"),
        (["--workers=0"], "--workers must be at least 1, got 0"),
        (["--time=1:00"], "--time=1:00 is 60 s, but --signal-seconds=300"),
        (["--trials=0"], "--trials must be at least 1, got 0"),
    ],
)
def test_refused(place, capsys, arguments, message):
    space = write_space(place)
    command = ["launch", "search", str(SETTINGS), str(space), *CPU, *arguments, f"--out={place / 'out'}"]
    assert main(command) == 2
    assert message in capsys.readouterr().err
    assert not (place / "out").exists()
