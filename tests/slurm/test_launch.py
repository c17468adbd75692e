"""`megatron-paint launch slurm`: what it refuses, what it submits, and that a dry run touches nothing."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import megatron_paint
from megatron_paint.cli.main import main
from megatron_paint.config.load import load_settings
from megatron_paint.launch.slurm.options import default_job_name
from megatron_paint.run.folder import RunFolder
from tests.slurm.scripts import SHAPES, write_config

TEMPLATES = ("student", "teacher", "evaluation", "example")
QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart"
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
    (tmp_path / "wrong.sh").write_text("module load cuda\nif then\n")
    (tmp_path / "open_document.sh").write_text("true\ncat <<EOF\nhello\n")
    (tmp_path / "joins.sh").write_text("echo \\")
    (tmp_path / "joins_empty.sh").write_text("echo \\\\\\\n\n")
    return tmp_path


def launch(*arguments):
    """Without the check of the inputs: there are no problems, tokenizer and weights."""
    return main(["launch", "slurm", "s.yaml", "--no-check", *arguments])


def test_submission(place, capsys):
    assert launch(*CPU, "--attempts=3", "--env=GIVEN", "optimizer.lr=1e-5") == 0
    script = place / "runs" / "a run" / "logs" / "launch.sbatch"
    assert (place / "calls").read_text() == f"--parsable {script}\n" * 3
    printed = capsys.readouterr().out
    assert "submitted  101, 102, 103; console runs/a run/logs/101.out\n" in printed
    text = script.read_text()
    assert text.startswith("#!/bin/bash -l\n# s.yaml on 2 x 2 processes, ")
    assert "#SBATCH --job-name=runs-a_run\n" in text
    (copy,) = script.parent.glob("launch/settings-*.yaml")
    assert f"-m megatron_paint train 'runs/a run/logs/launch/{copy.name}' run.resume=auto\n" in text
    estimate = "memory     training "
    assert f"\n{estimate}" in printed
    assert f"\n# {estimate}" in text
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


def test_settings_for_gpus_are_checked_where_there_are_none(place, capsys):
    """The estimate has what FP8 needs there."""
    assert launch("--nodes=2", "--dry-run", "megatron.fp8=hybrid", "objective.kernel=triton") == 0
    assert "FP8 copies of weights " in capsys.readouterr().out


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
    (["--nodes=1", "--nodelist=n1 n2"], "--nodelist='n1 n2' must be"),
    (["--nodes=1", "--switches=few"], "--switches='few' must be a number"),
    (["--nodes=1", "--segment=0"], "--segment='0' must be a number of nodes"),
    (["--nodes=1", "--gres=nvme 1"], "--gres='nvme 1' must be resources"),
    (["--nodes=1", "--gres=gpu:h100:4"], "--gres=gpu:h100:4 asks for 4 GPUs on each node, but --gpus-per-node=8"),
    (["--nodes=1", "--gres=nvme:1,gpu"], "asks for 1 GPU on each node, but --gpus-per-node=8"),
    (["--nodes=1", "--begin=in a while"], "--begin='in a while' must be a time"),
    (["--nodes=1", "--mail-type=END FAIL"], "--mail-type='END FAIL' must be events"),
    (["--nodes=1", "--mail-user=me@x; id"], "--mail-user='me@x; id' must be an address"),
    (["--nodes=1", '--comment=a"b'], "--comment='a\"b' must be letters"),
    (["--nodes=1", "--comment=a\n#SBATCH --nice"], "--comment='a\\n#SBATCH --nice' must be letters"),
    (["--nodes=1", "--prologue=none.sh"], "--prologue=none.sh cannot be read"),
    (["--nodes=1", "--prologue=wrong.sh"], "--prologue=wrong.sh is not valid for bash: line 2: "),
    (
        ["--nodes=1", "--prologue=open_document.sh"],
        "here-document at line 2 delimited by end-of-file (wanted `EOF')",
    ),
    (["--nodes=1", "--prologue=joins.sh"], "--prologue=joins.sh ends in a backslash"),
    (["--nodes=1", "--prologue=joins_empty.sh"], "--prologue=joins_empty.sh ends in a backslash"),
    (["--nodes=1", "--template=none.jinja"], "--template=none.jinja does not exist"),
    (["--nodes=1", "--gpu-memory=much"], "--gpu-memory='much' must be the memory of one GPU"),
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
    (["--nodes=1", "--copy-code", "run.dir=a:b"], "/a:b/logs/launch/code-"),
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
    (place / "queued").write_text("7|runs-a_run|/elsewhere/logs/launch.sbatch\n")
    assert launch(*CPU) == 2
    assert "--job-name=runs-a_run: job 7 of yours has this name" in capsys.readouterr().err
    ours = f"{place}/runs/a run/logs/launch.sbatch"
    (place / "queued").write_text(f"7|other|{ours}\n")
    assert launch(*CPU) == 2
    assert "job 7 of this run has the name other" in capsys.readouterr().err
    (place / "queued").write_text(f"6|other|/elsewhere/launch.sbatch\n7|runs-a_run|{ours}\n8|odd\n")
    assert launch(*CPU) == 0
    assert "they wait for earlier jobs of this run, because one job runs at a time: 7\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("run_dir", "name"),
    [
        ("runs/qwen3_8b/paint", "qwen3_8b-paint"),
        ("runs/qwen3_14b/paint", "qwen3_14b-paint"),
        ("/paint", "paint"),
        ("/scratch/me/a run", "me-a_run"),
        ("runs/it's/x#1", "it_s-x_1"),
    ],
)
def test_the_name_of_the_jobs_is_the_end_of_the_run_folder(run_dir, name):
    assert default_job_name(run_dir) == name


def test_a_run_folder_of_one_part_takes_the_folder_of_the_submission(place):
    assert default_job_name("paint") == f"{place.name}-paint".replace("[", "_").replace("]", "_")


def test_later_attempts_do_not_see_changed_settings(place):
    """The copy has the values of the base file and of the overrides. A second launch makes a second copy."""
    (place / "base.yaml").write_text((place / "s.yaml").read_text())
    (place / "s.yaml").write_text("base: base.yaml\noptimizer: {clip_grad: 0.7}\n")
    assert launch(*CPU, "optimizer.lr=3e-5") == 0
    asked = load_settings(place / "s.yaml", ["optimizer.lr=3e-5", "run.resume=auto"])
    (place / "base.yaml").write_text("model: {hf_path: other}\n")
    (place / "s.yaml").write_text("base: base.yaml\n")
    (copy,) = (place / "runs/a run/logs/launch").iterdir()
    assert load_settings(copy, ["run.resume=auto"]) == asked
    text = copy.read_text()
    (place / "s.yaml").write_text("model: {hf_path: model}\ndata: {train: t}\nrun: {dir: runs/a run, steps: 50}\n")
    assert launch(*CPU) == 0
    assert copy.read_text() == text
    assert len(list(copy.parent.iterdir())) == 2


def test_without_a_copy_the_jobs_read_the_file(place):
    assert launch(*CPU, "--no-copy", "optimizer.lr=1e-5") == 0
    script = (place / "runs/a run/logs/launch.sbatch").read_text()
    assert "-m megatron_paint train s.yaml optimizer.lr=1e-5 run.resume=auto\n" in script
    assert not (place / "runs/a run/logs/launch").exists()


def test_a_copy_of_the_code_runs_in_place_of_the_package(place):
    """Also where the package is in the current folder, which `python -m` searches first."""
    assert launch(*CPU, "--copy-code") == 0
    (code,) = (place / "runs/a run/logs/launch").glob("code-*")
    copied = {file.relative_to(code) for file in code.rglob("*") if file.is_file()}
    package = Path(megatron_paint.__file__).parent
    assert copied == {f.relative_to(package.parent) for f in package.rglob("*") if f.is_file() and f.suffix != ".pyc"}
    script = (place / "runs/a run/logs/launch.sbatch").read_text()
    (line,) = [line for line in script.splitlines() if "PYTHONPATH" in line]
    (place / "megatron_paint").mkdir()
    (place / "megatron_paint" / "__init__.py").write_text("raise SystemExit('the wrong one')\n")
    command = f"{line}\n{sys.executable} -c 'import megatron_paint; print(megatron_paint.__file__)'"
    found = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout
    assert found.strip() == str(code / "megatron_paint" / "__init__.py")
    before = code.stat().st_mtime_ns
    assert launch(*CPU, "--copy-code") == 0
    assert code.stat().st_mtime_ns == before


def test_a_colon_in_the_run_folder_is_refused_only_for_a_copy_of_the_code(place, capsys):
    assert launch(*CPU, "--copy-code", "run.dir=a:b", "--dry-run") == 2
    assert "give a run.dir whose complete path has no `:`, or leave out --copy-code" in capsys.readouterr().err
    assert launch(*CPU, "run.dir=a:b", "--dry-run") == 0


@pytest.mark.parametrize("check", ["--no-check", None])
def test_a_line_break_in_the_models_folder_is_refused(place, capsys, check):
    """It would add a command to the script, whose comments name the folder."""
    text = (place / "s.yaml").read_text()
    (place / "s.yaml").write_text(text.replace("hf_path: model", r'hf_path: "gone\ntouch X"'))
    assert main(["launch", "slurm", "s.yaml", *CPU, "--dry-run", *([check] if check else [])]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert r"model.hf_path='gone\ntouch X' must be one line of text without control characters" in line


def test_a_tensor_parallel_group_on_two_nodes_is_refused(place, capsys):
    wide = ["--nodes=4", "--gpus-per-node=6", "megatron.tensor_model_parallel_size=4", "--dry-run"]
    assert launch(*wide) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "megatron.tensor_model_parallel_size=4 does not divide the 6 processes of a node" in line
    assert "--tensor-parallel-across-nodes" in line
    assert launch(*wide, "--tensor-parallel-across-nodes") == 0
    assert launch("--nodes=1", "--gpus-per-node=8", "megatron.tensor_model_parallel_size=8", "--dry-run") == 0
    two = ["--nodes=2", "--gpus-per-node=4", "megatron.tensor_model_parallel_size=8", "--dry-run"]
    assert launch(*two) == 2


def test_the_script_has_the_estimate_and_the_warning(place, capsys):
    """8B with all weights at TP 2 on four GPUs of 40 GB each."""
    change = ["megatron.recompute_granularity=full", "megatron.recompute_method=uniform"]
    change += ["megatron.recompute_num_layers=1", "--gpu-memory=40GB"]
    assert launch("--nodes=2", "--gpus-per-node=4", "--dry-run", *change) == 0
    head = capsys.readouterr().out.partition("\nset -euo pipefail\n")[0]
    comments = [line.removeprefix("# ") for line in head.splitlines() if line.startswith("# ")]
    assert [line.split()[0] for line in comments[1:]] == [
        *("model", "layout", "step", "memory", "sampling", "the", "host", "warning:")
    ]
    assert "of a GPU's 40 GB" in head
    assert "on a node of 4 ranks" in head
    assert comments[-1].startswith("warning: the estimated peak of ")


def test_a_login_node_without_the_model_needs_no_check(place, capsys):
    assert launch(*CPU, "model.hf_path=/only/on/nodes", "--dry-run") == 0
    assert "# no plan and no estimate of memory: this machine does not see " in capsys.readouterr().out
    assert launch("--nodes=1", "--gpus-per-node=3", "model.hf_path=/only/on/nodes", "--dry-run") == 2
    assert "must be a multiple of 2" in capsys.readouterr().err
    assert main(["launch", "slurm", "s.yaml", *CPU, "model.hf_path=/only/on/nodes", "--dry-run"]) == 2
    assert "error: model.hf_path: /only/on/nodes is not a folder" in capsys.readouterr().err


@pytest.fixture
def inputs(place):
    """The quickstart's model and problems, complete, and settings for them."""
    shutil.copytree(QUICKSTART / "model", place / "complete")
    shutil.copy(QUICKSTART / "train.jsonl", place / "train.jsonl")
    (place / "s.yaml").write_text(
        f"base: {QUICKSTART / 'paint.yaml'}\nmodel: {{hf_path: complete}}\nrun: {{dir: runs/a run}}\n"
        "data: {train: train.jsonl}\nevaluation: {problems: null}\nprompts: "
        + "".join(f"\n  {name}_template: {QUICKSTART / 'templates' / name}.jinja" for name in TEMPLATES)
    )
    return place


def test_data_tokenizer_and_weights_are_checked(inputs, capsys):
    arguments = ["launch", "slurm", "s.yaml", "--nodes=1", "--gpus-per-node=0", "--processes-per-node=4"]
    assert main(arguments) == 0
    assert "\ndata       " in capsys.readouterr().out
    for file, says in (
        ("train.jsonl", "train.jsonl"),
        ("complete/model.safetensors", "model.safetensors"),
        ("complete/tokenizer.json", "tokenizer"),
    ):
        kept = (inputs / file).rename(inputs / "kept")
        before = sorted(inputs.rglob("*"))
        assert main([*arguments, "--dry-run"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert says in line
        assert line.endswith(" (--no-check skips this check, if only the nodes see the files)")
        assert main(arguments) == 2
        assert sorted(inputs.rglob("*")) == before
        capsys.readouterr()
        assert main([*arguments, "--dry-run", "--no-check"]) == 0
        capsys.readouterr()
        kept.rename(inputs / file)


def test_a_template_of_the_users(place, capsys):
    own = place / "own.jinja"
    own.write_text("#!/bin/bash\n{% for line in directives %}\n#SBATCH {{ line }}\n{% endfor %}\necho {{ run|path }}\n")
    assert launch(*CPU, "--dry-run", "--template=own.jinja") == 0
    printed = capsys.readouterr().out
    assert printed.startswith("#!/bin/bash\n#SBATCH --job-name=runs-a_run\n")
    assert "\necho 'runs/a run'\n" in printed


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("#!/bin/bash\n{% if %}\n", "own.jinja, line 2: Expected an expression"),
        ("#!/bin/bash\n{{ nodse }}\n", "own.jinja: 'nodse' is undefined"),
        ("#!/bin/bash\nif true\n", "own.jinja: the script is not valid for bash: line"),
        ("#!/bin/bash\ncat <<EOF\n", "own.jinja: the script is not valid for bash: line "),
        ("echo\n", "own.jinja: its first line is not #!/bin/bash"),
        ("#!/bin/bash\n{% include 'none' %}\n", "own.jinja: 'none' not found"),
    ],
)
def test_a_wrong_template_is_one_line(place, capsys, text, says):
    (place / "own.jinja").write_text(text)
    assert launch(*CPU, "--template=own.jinja") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--template={says}" in line


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
