"""What a command imports before it answers, and what it prints before it waits."""

import os
import subprocess
import sys

import pytest

from megatron_paint.cli.main import main
from tests.support.finished import ROOT, SETTINGS, STEPS, make_finished_run

CODE = """
import sys
from megatron_paint.cli.main import main
try:
    status = main(sys.argv[1:])
except SystemExit as end:
    status = end.code
print(*sorted({name.split(".")[0] for name in sys.modules}), file=sys.stderr)
sys.exit(status)
"""
HEAVY = {"torch", "transformers", "megatron", "datasets", "pyarrow", "matplotlib", "math_verify"}


def run(*arguments):
    """(exit status, stdout, lines of stderr except the last, the packages that were imported)."""
    done = subprocess.run(
        [sys.executable, "-c", CODE, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    *err, packages = done.stderr.splitlines()
    return done.returncode, done.stdout, err, set(packages.split())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return make_finished_run(tmp_path_factory.mktemp("start") / "run").path


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["train", "--help"], ["evaluate", "--help"]])
def test_help_imports_nothing_large(arguments):
    status, out, err, packages = run(*arguments)
    assert (status, err) == (0, [])
    assert "megatron-paint" in out
    assert not packages & (HEAVY | {"rich", "numpy", "jinja2", "pydantic"})


MISTAKES = {
    "misspelt key": ([SETTINGS, "optimizer.lrr=1"], "did you mean optimizer.lr?"),
    "wrong value": ([SETTINGS, "run.steps=-1"], "nearest valid value is 1"),
    "contradiction": ([SETTINGS, "optimizer.min_lr=1.0"], "optimizer.min_lr=1.0 is above"),
    "no settings file": (["nowhere.yaml"], "nowhere.yaml does not exist"),
    "misspelt settings file": ([f"{SETTINGS}l"], f"does not exist: did you mean {os.path.basename(SETTINGS)}?"),
    "no model folder": ([SETTINGS, "model.hf_path=nowhere"], "nowhere is not a folder"),
    "layout": ([SETTINGS, "megatron.pipeline_model_parallel_size=3"], "does not divide the number of layers"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_settings_waits_for_no_import(mistake):
    arguments, says = MISTAKES[mistake]
    status, out, err, packages = run("train", *arguments)
    assert (status, out, len(err)) == (2, "", 1)
    assert says in err[0]
    assert not packages & (HEAVY | {"rich", "numpy", "jinja2"})


def test_a_mistake_in_the_settings_of_an_evaluation():
    status, _, err, packages = run("evaluate", SETTINGS, "evaluation.sample=2")
    assert status == 2
    assert "did you mean evaluation.samples?" in err[0]
    assert not packages & HEAVY


def test_looking_at_a_run_needs_no_torch(finished):
    status, out, err, packages = run("status", finished)
    assert (status, err) == (0, [])
    assert "step 2 of 2" in out
    assert not packages & HEAVY
    status, out, err, packages = run("inspect", "samples", finished, 1)
    assert (status, err) == (0, [])
    assert "problem a, step 1" in out
    assert out.count("[[") == 1
    assert not packages & HEAVY


def test_a_finished_run_is_answered_without_torch(finished):
    status, out, err, packages = run("train", SETTINGS, f"run.dir={finished}", f"run.steps={STEPS}", "--processes", "4")
    assert (status, err) == (0, [])
    assert f"Results: {finished}" in out
    assert not packages & HEAVY


def test_the_plan_is_printed_before_ranks_start(tmp_path, monkeypatch, capsys):
    printed = []

    def run_here(arguments, processes, **_):
        printed.append((processes, os.environ.get("GLOO_SOCKET_IFNAME"), capsys.readouterr().out))
        return 0

    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr("megatron_paint.cli.ranks.run_here", run_here)
    assert main(["train", SETTINGS, f"run.dir={tmp_path / 'run'}", "--processes", "4"]) == 0
    ((processes, interface, out),) = printed
    assert (processes, interface) == (4, "lo" if sys.platform == "linux" else interface)
    lines = out.splitlines()
    starts = ["model", "layout", "layers", "loss", "step", "memory", "sampling", "for", "host", "data", "thinking"]
    starts.append("starting")
    assert [line.split()[0] for line in lines] == starts
    assert lines[-1].startswith("starting 4 ranks: ")
    assert "GLOO_SOCKET_IFNAME" not in os.environ


@pytest.mark.parametrize("processes", ["8", "512"])
def test_the_plan_needs_no_weights(processes, tmp_path, monkeypatch, capsys):
    """It comes from config.json alone, for any number of ranks. Only then the missing weights are an error."""
    monkeypatch.chdir(ROOT)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_bytes((ROOT / "examples/quickstart/model/config.json").read_bytes())
    arguments = [SETTINGS, f"model.hf_path={model}", "--processes", processes, "--gpu-memory", "24GB", "--dry-run"]
    assert main(["train", *arguments]) == 2
    printed = capsys.readouterr()
    assert f"layout     {processes} processes = tensor 2 x pipeline 2 x data {int(processes) // 4};" in printed.out
    assert "of a GPU's 24 GB" in printed.out
    assert "model.safetensors" in printed.err
    assert main(["train", *arguments, "--gpu-memory", "much"]) == 2
    assert "--gpu-memory='much' must be the memory of one GPU" in capsys.readouterr().err
