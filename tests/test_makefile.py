"""The Makefile's lists of test files: each file is there; `make test-further` runs what `make test` leaves out."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def pytest_command(target):
    """Words of the pytest command that this target would run, in an environment that is ready."""
    environment = os.environ | {"VIRTUAL_ENV": "/environment"}
    command = ["make", "-n", "--no-print-directory", target]
    made = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    (line,) = [line for line in made.stdout.replace("\\\n", " ").splitlines() if "-m pytest" in line]
    return line.split()


@pytest.mark.parametrize("active", [True, False])
def test_install_fills_the_active_environment_or_a_new_one(active, tmp_path):
    """In a folder without .venv. The version of torch comes first."""
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    (tmp_path / "setup.py").touch()
    environment = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    environment |= {"VIRTUAL_ENV": "/environment"} if active else {}
    command = ["make", "-n", "--no-print-directory", "install", "TORCH=torch==2.13.0"]
    made = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    python = "/environment/bin/python" if active else ".venv/bin/python"
    installs = [line.split() for line in made.stdout.splitlines() if " -m pip install " in line]
    assert [words[0] for words in installs] == [python, python]
    assert installs[0][-1] == "torch==2.13.0"
    assert installs[1][-2:] == ["-e", '".[test,docs,tensorboard,wandb,mlflow]"']


def left_out(target):
    return {word.removeprefix("--ignore=") for word in pytest_command(target) if word.startswith("--ignore=")}


@pytest.mark.parametrize("target", ["test", "check"])
def test_what_a_target_leaves_out_is_there(target):
    assert left_out(target)
    assert [path for path in left_out(target) if not (ROOT / path).exists()] == []


def test_each_test_belongs_to_test_or_to_test_further():
    assert {word for word in pytest_command("test-further") if word.startswith("tests/")} == left_out("test")
