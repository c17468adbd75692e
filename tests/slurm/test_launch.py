"""`megatron-paint launch slurm`: what it refuses, what it submits, and that a dry run touches nothing."""

import os
import subprocess

import pytest

from megatron_paint.cli.main import main
from megatron_paint.run.folder import RunFolder
from tests.slurm.scripts import SHAPES, write_config

CPU = ["--nodes=2", "--gpus-per-node=0", "--processes-per-node=2"]
STUBS = {
    "sbatch": 'printf "%s\\n" "$*" >> calls\necho "$((100 + $(wc -l < calls)));cluster"\n',
    "squeue": "cat queued 2> /dev/null || true\n",
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with settings, a model's config.json, and stand-ins for Slurm's commands."""
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path / "model", *SHAPES["Qwen3-8B"])
    (tmp_path / "s.yaml").write_text(
        "model: {hf_path: model}\ndata: {train: t}\nrun: {dir: runs/a run, steps: 40}\n"
        "megatron: {tensor_model_parallel_size: 2}\n"
    )
    (tmp_path / "bin").mkdir()
    for name, text in STUBS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("GIVEN", "the value")
    monkeypatch.delenv("MISSING", raising=False)
    (tmp_path / "open.env").write_text("A=1\n")
    (tmp_path / "open.env").chmod(0o644)
    return tmp_path


def launch(*arguments):
    return main(["launch", "slurm", "s.yaml", *arguments])


def test_submission(place, capsys):
    assert launch(*CPU, "--attempts=3", "--env=GIVEN", "optimizer.lr=1e-5") == 0
    script = place / "runs" / "a run" / "logs" / "launch.sbatch"
    assert (place / "calls").read_text() == f"--parsable {script}\n" * 3
    assert "submitted  101, 102, 103; console runs/a run/logs/101.out\n" in capsys.readouterr().out
    text = script.read_text()
    assert "#SBATCH --job-name=a_run\n" in text
    assert "-m megatron_paint train s.yaml optimizer.lr=1e-5 run.resume=auto\n" in text
    assert "the value" not in text
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert [(line["event"], line["steps"]) for line in RunFolder(script.parents[1]).read_attempts()] == [("launch", 40)]
    (place / "runs" / "a run" / "STOPPED").write_text("x\n")
    assert launch(*CPU) == 0
    assert not (place / "runs" / "a run" / "STOPPED").exists()


def test_a_dry_run_touches_nothing(place, capsys):
    before = sorted(place.rglob("*"))
    assert launch(*CPU, "--attempts=2", "--dry-run") == 0
    printed = capsys.readouterr().out
    assert printed.startswith("#!/bin/bash -l\n")
    assert printed.count(f"\n# sbatch --parsable '{place}/runs/a run/logs/launch.sbatch'") == 2
    assert sorted(place.rglob("*")) == before


def test_settings_for_gpus_are_checked_where_there_are_none(place):
    assert launch("--nodes=2", "--dry-run", "megatron.fp8=hybrid", "objective.kernel=triton") == 0


REFUSALS = [
    (["--nodes=0"], "--nodes must be at least 1, got 0"),
    (["--nodes=two"], "argument --nodes: invalid int value: 'two'"),
    ([], "--nodes"),
    (["--nodes=1", "--gpus-per-node=-1"], "--gpus-per-node must be at least 0, got -1"),
    (["--nodes=1", "--gpus-per-node=0"], "give --processes-per-node"),
    (["--nodes=1", "--gpus-per-node=4", "--processes-per-node=5"], "give at most 4"),
    (["--nodes=1", "--processes-per-node=0"], "--processes-per-node must be at least 1, got 0"),
    (["--nodes=1", "--gpus-per-node=3"], "their number must be a multiple of 2"),
    (["--nodes=1", "--launcher=mpirun"], "--launcher"),
    (["--nodes=1", "--launcher=srun", "--max-restarts=2"], "--max-restarts=2 needs torchrun"),
    (["--nodes=1", "--max-restarts=-1"], "--max-restarts must be at least 0, got -1"),
    (["--nodes=1", "--cpus-per-task=0"], "--cpus-per-task must be at least 1, got 0"),
    (["--nodes=1", "--attempts=0"], "--attempts must be at least 1, got 0"),
    (["--nodes=1", "--signal-seconds=70000"], "--signal-seconds must be in 1 to 65535, got 70000"),
    (["--nodes=1", "--time=tomorrow"], "--time='tomorrow' must be minutes, HH:MM:SS or D-HH:MM:SS"),
    (["--nodes=1", "--time=5"], "--time=5 is 300 s, but --signal-seconds=300"),
    (["--nodes=1", "--time=5", "--signal-seconds=60"], "a run stops run.exit_before_limit_s=300 s before its end"),
    (["--nodes=1", "--account=a b"], "--account='a b' must be"),
    (["--nodes=1", "--partition=a#b"], "--partition='a#b' must be"),
    (["--nodes=1", "--qos=$(id)"], "--qos='$(id)' must be"),
    (["--nodes=1", "--constraint=a b"], "--constraint='a b' must be"),
    (["--nodes=1", "--reservation=r\n#SBATCH --nice"], "--reservation='r\\n#SBATCH --nice' must be"),
    (["--nodes=1", "--exclude=n1 n2"], "--exclude='n1 n2' must be"),
    (["--nodes=1", "--job-name=a;b"], "--job-name='a;b' must be"),
    (["--nodes=1", "--mem=much"], "--mem='much' must be"),
    (["--nodes=1", "--module=cuda; id"], "--module='cuda; id' must be"),
    (["--nodes=1", "--module=--x"], "--module='--x' must be"),
    (["--nodes=1", "--sbatch=nice"], "--sbatch='nice' must be one line of sbatch's options"),
    (["--nodes=1", "--sbatch", "--nice\nid"], "--sbatch='--nice\\nid' must be one line"),
    (["--nodes=1", "--mount=/a:/b"], "--mount needs a container"),
    (["--nodes=1", "--container-runtime=pyxis"], "--container-runtime needs a container"),
    (["--nodes=1", "--container=a\nb"], "--container='a\\nb' must be one line"),
    (["--nodes=1", "--container=a", "--mount=/a,/b:/c"], "--mount='/a,/b:/c' must be FROM:TO"),
    (["--nodes=1", "--container=a", "--mount=/a"], "--mount='/a' must be FROM:TO"),
    (["--nodes=1", "--venv=v", "--python=p"], "leave one of them out"),
    (["--nodes=1", "--python=p\nq"], "--python='p\\nq' must be one line"),
    (["--nodes=1", "--env=MISSING"], "MISSING is not set in this shell"),
    (["--nodes=1", "--env=a-b"], "--env 'a-b' must be the name of a variable"),
    (["--nodes=1", "--env=ALL"], "--env 'ALL' must be the name of a variable"),
    (["--nodes=1", "--env=GIVEN=hush"], "--env GIVEN=... contains a value"),
    (["--nodes=1", "--env-file=none.env"], "--env-file=none.env does not exist"),
    (["--nodes=1", "--env-file=open.env"], "--env-file=open.env can be read or written by other users"),
    (["--nodes=1", "run.dir=a%b"], "run.dir='a%b' contains one of"),
    (["--nodes=1", 'run.dir=a"b'], "run.dir='a\"b' contains one of"),
    (["--nodes=1", "model.hf_path=a\nb"], "must be one line of text"),
    (["--nodes=1", "optimizer.rl=1"], "unknown setting optimizer.rl"),
    (["--nodes=1", "--nice=3"], "unknown argument '--nice=3'"),
]


@pytest.mark.parametrize(("arguments", "says"), REFUSALS, ids=[" ".join(case[0])[:60] for case in REFUSALS])
def test_refusals_are_one_line(place, capsys, arguments, says):
    before = sorted(place.rglob("*"))
    assert launch(*arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("megatron-paint: error: ")
    assert says in line
    assert "hush" not in line
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize("time", ["360", "6:00", "0:06:00", "1-0", "1-02:30", "0-00:05:01"])
def test_times(place, time):
    assert launch(*CPU, "--dry-run", f"--time={time}") == 0


def test_a_name_of_another_run_is_refused(place, capsys):
    (place / "queued").write_text("7|a_run|/elsewhere/logs/launch.sbatch\n")
    assert launch(*CPU) == 2
    assert "--job-name=a_run: job 7 of yours has this name" in capsys.readouterr().err
    ours = f"{place}/runs/a run/logs/launch.sbatch"
    (place / "queued").write_text(f"7|other|{ours}\n")
    assert launch(*CPU) == 2
    assert "job 7 of this run has the name other" in capsys.readouterr().err
    (place / "queued").write_text(f"6|other|/elsewhere/launch.sbatch\n7|a_run|{ours}\n8|odd\n")
    assert launch(*CPU) == 0
    assert "they wait for earlier jobs of this run, because one job runs at a time: 7\n" in capsys.readouterr().out


def test_what_sbatch_says_is_told(place, capsys):
    (place / "bin" / "sbatch").write_text('#!/bin/bash\necho "sbatch: error: invalid account" >&2\nexit 1\n')
    assert launch(*CPU) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "sbatch refused the job: sbatch: error: invalid account. The script is " in line


def test_a_refused_launch_leaves_a_stop_in_place(place, capsys):
    run = place / "runs" / "a run"
    run.mkdir(parents=True)
    (run / "STOPPED").write_text("why\n")
    (place / "bin" / "sbatch").write_text("#!/bin/bash\nexit 1\n")
    assert launch(*CPU) == 2
    assert "sbatch refused the job: exit status 1" in capsys.readouterr().err
    assert (run / "STOPPED").read_text() == "why\n"
    assert RunFolder(run).read_attempts()[-1]["steps"] == 0  # no launch is waited for


def test_jobs_of_a_chain_that_were_submitted_before_a_refusal_are_named(place, capsys):
    (place / "bin" / "sbatch").write_text(f"#!/bin/bash\n{STUBS['sbatch']}[ $(wc -l < calls) -lt 3 ]\n")
    assert launch(*CPU, "--attempts=4") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "sbatch refused the job: exit status 1." in line
    assert line.endswith("2 of 4 jobs were submitted before that and still exist: `scancel 101 102` cancels them")
    assert len(RunFolder(place / "runs" / "a run").read_attempts()) == 1


def test_without_slurm(place, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(place / "empty"))
    assert launch(*CPU) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "sbatch was not found: launch from a machine that submits to Slurm" in line


def test_a_run_with_other_settings_is_refused(place, capsys):
    folder = place / "runs" / "a run"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").touch()
    assert launch(*CPU) == 2
    assert "is neither empty nor a run folder" in capsys.readouterr().err
