"""The wheel: it has every file that a user needs, and works in a folder without the checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from megatron_paint.config.load import load_settings
from tests.support.sources import copy_sources

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel that is built from a copy of the sources, because a build leaves files behind."""
    folder = tmp_path_factory.mktemp("wheel")
    source = copy_sources(folder / "source")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", folder, source]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (found,) = folder.glob("megatron_paint-*.whl")
    return found


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
    """The folder of packages that the wheel is unpacked into."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def run(site, folder, *arguments):
    """The command of the wheel in `folder`, where no checkout is."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-m", "megatron_paint", *arguments],
        cwd=folder,
        env=environment | {"PYTHONPATH": str(site), "COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_it_has_all_modules_and_examples(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "megatron_paint").rglob("*.py")}
    assert modules <= names
    presets = {path for path in (ROOT / "examples").glob("qwen3_*/*.yaml")}
    quickstart = {path for path in (ROOT / "examples" / "quickstart").rglob("*") if path.is_file()}
    assert (len(presets), len(quickstart)) == (46, 16)
    examples = {f"megatron_paint/{path.relative_to(ROOT)}" for path in presets | quickstart}
    assert {name for name in names if name.startswith("megatron_paint/examples/")} == examples
    assert not any(name.startswith(("tests/", "examples/", "tools/")) for name in names)


def test_it_has_all_other_data_of_the_packages(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    data = {path for path in (ROOT / "megatron_paint").rglob("*") if path.is_file() and path.suffix != ".py"}
    expected = {str(path.relative_to(ROOT)) for path in data if "__pycache__" not in path.parts}
    assert {name for name in expected if not name.startswith("megatron_paint/examples/")} <= names


def test_the_repository_has_one_copy_of_the_examples():
    assert not (ROOT / "megatron_paint" / "examples").exists()


def test_it_is_the_wheel_that_runs(site, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(site)}
    code = "import megatron_paint; print(megatron_paint.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == str(site / "megatron_paint" / "__init__.py")


def test_help(site, tmp_path):
    done = run(site, tmp_path, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "megatron-paint init qwen3_8b paint > my.yaml" in done.stdout


def test_init(site, tmp_path):
    done = run(site, tmp_path, "init", "qwen3_8b", "paint")
    assert (done.returncode, done.stderr) == (0, "")
    (tmp_path / "my.yaml").write_text(done.stdout)
    assert load_settings(tmp_path / "my.yaml") == load_settings(ROOT / "examples" / "qwen3_8b" / "paint.yaml")
    assert run(site, tmp_path, "init", "--list").stdout.count("\n") == 7


def test_a_dry_run_of_the_quickstart(site, tmp_path):
    done = run(site, tmp_path, "quickstart", "--out", "try", "--dry-run")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == f"the same run: megatron-paint train {tmp_path}/try/paint.yaml --processes 4 --dry-run"
    assert any("4 processes = tensor 2 x pipeline 2 x data 1" in line for line in lines)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["try"]
    assert not (tmp_path / "try" / "runs").exists()
