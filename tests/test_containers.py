"""The recipes of containers: linted, and in agreement with each other and with setup.py."""

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.support.sources import SOURCES, copy_sources

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "containers"
DOCKERFILE = (FOLDER / "Dockerfile").read_text()
RECIPE = (FOLDER / "megatron_paint.def").read_text()
SCRIPT = FOLDER / "install.sh"
PARTS = ["system", "torch", "apex", "package"]


def tool(name):
    """A program of this environment or of the system; without it, the test is skipped."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}:{Path('/usr/bin')}") or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def test_hadolint_finds_nothing():
    done = subprocess.run([tool("hadolint"), FOLDER / "Dockerfile"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


def test_shellcheck_finds_nothing():
    done = subprocess.run([tool("shellcheck"), SCRIPT], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


def test_shellcheck_finds_nothing_in_the_sections_of_the_recipe(tmp_path):
    """Apptainer runs them with sh; its arguments are replaced before."""
    sections = re.split(r"^%(\w+)\n", RECIPE, flags=re.MULTILINE)
    texts = dict(zip(sections[1::2], sections[2::2], strict=True))
    assert list(texts) == ["arguments", "files", "post", "environment", "runscript", "test", "help"]
    for name in ("post", "environment", "runscript", "test"):
        file = tmp_path / f"{name}.sh"
        file.write_text("#!/bin/sh\n" + re.sub(r"\{\{ (\w+) \}\}", r"$\1", texts[name]))
        options = ["--exclude=SC2154"]  # a variable that Apptainer fills in
        done = subprocess.run([tool("shellcheck"), *options, file], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout) == (0, ""), name


def test_both_recipes_have_the_same_arguments():
    docker = dict(re.findall(r'^ARG (\w+)="?([^"\n]*)"?$', DOCKERFILE, re.MULTILINE))
    apptainer = dict(re.findall(r"^    ([A-Z_]+)=(.*)$", RECIPE, re.MULTILINE))
    assert docker == apptainer
    assert set(docker) == {"BASE", "TORCH", "EXTRAS", "APEX", "APEX_REF", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS"}
    assert re.fullmatch(r"nvidia/cuda:13\.\d+\.\d+-cudnn-devel-ubuntu24\.04", docker["BASE"])
    assert docker["APEX"] == "0"
    setup = (ROOT / "setup.py").read_text()
    assert f'"{docker["TORCH"]}"' in setup
    assert all(f'        "{extra}": [' in setup for extra in docker["EXTRAS"].split(","))
    assert "core_cu13" in setup  # the major version of the base


def test_both_recipes_run_all_parts_in_their_order():
    for text in (DOCKERFILE, RECIPE):
        assert re.findall(r"/opt/install/install\.sh (\w+)", text) == PARTS
        assert re.search(r'if \[ "(\$\{APEX\}|\{\{ APEX \}\})" = 1 \]; then /opt/install/install.sh apex; fi', text)


def test_both_recipes_copy_what_the_package_needs():
    docker = re.findall(r"^COPY (.+) \S+$", DOCKERFILE, re.MULTILINE)
    copied = {name for names in docker for name in names.split()}
    assert copied == set(re.findall(r"^    (\S+) /opt/install/\S+$", RECIPE, re.MULTILINE))
    assert copied == {*SOURCES, "examples/containers/install.sh"}
    assert all((ROOT / name).exists() for name in copied)
    allowed = re.findall(r"^!(.+)$", (FOLDER / "Dockerfile.dockerignore").read_text(), re.MULTILINE)
    assert {name.split("/")[0] for name in copied} == set(allowed)


@pytest.mark.parametrize("arguments", [[], ["all"], ["package"]])
def test_the_script_refuses_what_it_does_not_know(arguments):
    done = subprocess.run(["bash", SCRIPT, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "usage: install.sh" in done.stderr or "give the folder of the package" in done.stderr


@pytest.mark.parametrize(
    ("extras", "installed"), [(None, "[gpu,tensorboard]"), ("tensorboard", "[tensorboard]"), ("", "")]
)
def test_the_script_installs_the_extras_that_are_asked_for(tmp_path, extras, installed):
    (tmp_path / "bin").mkdir()
    for name in ("python", "megatron-paint"):
        (tmp_path / "bin" / name).write_text('#!/bin/sh\necho "$@"\n')
        (tmp_path / "bin" / name).chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "VENV": str(tmp_path)} | ({} if extras is None else {"EXTRAS": extras})
    done = subprocess.run(
        ["bash", SCRIPT, "package", "/source"], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].split()[-1] == f"/source{installed}"


@pytest.mark.long
def test_the_script_installs_a_command_that_runs(tmp_path):
    """Without CUDA and without an image: what the Dockerfile copies and runs after the system's packages."""
    venv, source = tmp_path / "venv", copy_sources(tmp_path / "source")
    wanted = {"VENV": str(venv), "TORCH": f"torch=={version('torch').partition('+')[0]}", "EXTRAS": "tensorboard"}
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    subprocess.run([sys.executable, "-m", "venv", venv], check=True, timeout=120)
    for part in (["torch"], ["package", source]):
        done = subprocess.run(
            ["bash", SCRIPT, *part], env=environment | wanted, capture_output=True, text=True, timeout=800
        )
        assert done.returncode == 0, done.stderr[-3000:]
    for arguments in (
        ["quickstart", "--out", "quickstart", "--dry-run"],
        ["train", "quickstart/paint.yaml", "--processes", "4", "run.steps=1", "run.dir=run"],
    ):
        command = [venv / "bin" / "megatron-paint", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == 1
