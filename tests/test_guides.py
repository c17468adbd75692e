"""The guides do what they say: their files and commands, in their order, as a reader copies them."""

import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import pytest

from megatron_paint.cli.main import main
from megatron_paint.config.load import load_settings
from megatron_paint.config.schedule import due_after, expired_checkpoints
from megatron_paint.planning.memory import checkpoint_bytes, make_plan
from megatron_paint.planning.search.sizes import find_model, folder_of
from tests.support import tiny

ROOT = Path(__file__).parents[1]
GUIDES = ROOT / "docs" / "guides"
BLOCK = re.compile(r"^```(?P<language>\w*)(?: file=(?P<file>\S+))?\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
INSTALLS = re.compile(r"pip install|^mkdir -p ~/", re.MULTILINE)  # what the environment of the tests has already
MODEL = "/models/Qwen3-8B"


@dataclass(frozen=True)
class Block:
    """A code block of a guide. file: the name under which a reader saves it; empty: he does not."""

    language: str
    file: str
    text: str


def blocks(guide: str) -> list[Block]:
    """The blocks of a guide that a reader copies, in order."""
    found = BLOCK.finditer((GUIDES / guide).read_text())
    return [Block(match["language"], match["file"] or "", match["text"]) for match in found if match["language"]]


def commands(guide: str) -> list[list[str]]:
    """The arguments of its `megatron-paint` commands, those of a reader's own terminal."""
    found = []
    for block in blocks(guide):
        text = block.text.replace("\\\n", " ") if block.language == "bash" and not INSTALLS.search(block.text) else ""
        lines = [shlex.split(line, comments=True) for line in text.splitlines()]
        found += [line[1:] for line in lines if line[:1] == ["megatron-paint"]]
    return found


def save_files(guide: str, folder: Path, *, model: Path | None = None) -> list[str]:
    """Saves the files of a guide, and returns their names. model: a folder in place of the guide's model."""
    files = [block for block in blocks(guide) if block.file]
    for block in files:
        (folder / block.file).write_text(block.text.replace(MODEL, str(model or MODEL)))
    return [block.file for block in files]


def test_the_laptop_guide_s_files(tmp_path, monkeypatch, capsys):
    """Its 20 problems are right, in the columns that its settings name; every dry run of it passes."""
    monkeypatch.chdir(tmp_path)
    assert save_files("laptop.md", tmp_path) == ["mine.jsonl", "my.yaml", "ask.py"]
    rows = [json.loads(line) for line in (tmp_path / "mine.jsonl").read_text().splitlines()]
    assert len({row["question"] for row in rows}) == 20
    held_out = {json.loads(line)["problem"] for line in (ROOT / "examples/quickstart/held_out.jsonl").open()}
    assert not held_out & {row["question"] for row in rows}
    for row in rows:
        assert sum(int(part) for part in re.findall(r"[+-]?\d+", row["question"])) == row["result"]
        assert row["worked"].endswith(f"\\boxed{{{row['result']}}}")
    assert main(["quickstart", "--dry-run"]) == 0
    settings = load_settings(tmp_path / "my.yaml")
    assert (settings.run.steps, settings.data.problems_per_step, settings.data.columns.answer) == (20, 10, "result")
    dry = [arguments for arguments in commands("laptop.md") if "--dry-run" in arguments]
    assert dry == [["train", "my.yaml", "--dry-run"]]
    assert main(dry[0]) == 0
    printed = capsys.readouterr().out
    assert "data       20 training problems, 240 held-out problems" in printed
    last = printed.splitlines()[-1]
    assert f"The last line must be `{last}`." in (GUIDES / "laptop.md").read_text()


@pytest.mark.long
def test_the_laptop_guide_word_for_word(tmp_path):
    """Every block after the installation, in its order. The numbers that the guide shows are those that come out."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for name, command in (("megatron-paint", " -m megatron_paint"), ("python", "")):
        (bin_folder / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)}{command} "$@"\n')
        (bin_folder / name).chmod(0o755)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"}
    environment |= {"COLUMNS": "120", "NO_COLOR": "1"}
    folder, printed, expected = tmp_path / "first_hour", "", []
    folder.mkdir()
    for match in BLOCK.finditer((GUIDES / "laptop.md").read_text()):
        text = match["text"]
        if match["file"]:
            (folder / match["file"]).write_text(text)
        elif match["language"] == "bash" and not INSTALLS.search(text):
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", text], cwd=folder, env=environment, capture_output=True, text=True
            )
            assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
            printed += done.stdout
        elif not match["language"]:
            expected += text.splitlines()
    assert expected
    assert not [line for line in expected if _cells(line) not in _rows(printed)]
    assert "\\boxed{49}" in printed
    for name in ("quickstart/runs/quickstart/report.html", "runs/mine/report.html", "exported/model.safetensors"):
        assert (folder / name).is_file(), name


def _cells(line: str) -> tuple[str, ...]:
    return tuple(cell.strip() for cell in line.split("│"))


def _rows(printed: str) -> set[tuple[str, ...]]:
    return {_cells(line) for line in printed.splitlines()}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model in place of the guides' Qwen3-8B. It has room for their prompts and responses."""
    return tiny.make_model(tmp_path_factory.mktemp("model") / "Qwen3-8B", positions=16384)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder of a reader who has problems."""
    monkeypatch.chdir(tmp_path)
    (example,) = (json.loads(block.text) for block in blocks("one_node.md") if block.language == "json")
    for name, first in (("problems", 0), ("held_out", 40)):
        rows = [
            example | {"id": f"{name}-{n}", "problem": f"{example['problem']} ({n})"} for n in range(first, first + 40)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def run_dry(arguments: list[str], model: Path, folder: Path) -> None:
    """Runs a command, with the model in place of the guide's, as far as it can go on a machine without GPUs."""
    arguments = [word.replace(MODEL, str(model)) for word in arguments]
    if ">" in arguments:
        *arguments, _, file = arguments
        with (folder / file).open("w") as out, contextlib.redirect_stdout(out):
            assert main(arguments) == 0
        return
    if arguments[0] == "train" and "--dry-run" in arguments:
        arguments += ["--processes", "8", "--gpu-memory", "80GB"]
    assert main(arguments) == 0, arguments


RUNS = {"init", "plan"}  # commands that need no GPU and no run, besides those with --dry-run


SAYS = {
    "one_node.md": ("8 processes = tensor 2 x pipeline 1 x data 4",),
    "slurm.md": ("#SBATCH --job-name=runs-first\n", "#SBATCH --nodes=2\n", "#SBATCH --signal=B:USR1@300\n"),
}


@pytest.mark.parametrize("guide", SAYS)
def test_a_guide_s_settings_and_commands(guide, folder, model, capsys):
    """The settings load over the preset; dry runs and plans end without an error, on the guide's layout."""
    run, saved = 0, False
    for arguments in commands(guide):
        if arguments[0] == "init":
            run_dry(arguments, model, folder)
            saved = save_files(guide, folder, model=model) == ["my.yaml"]
        elif "--dry-run" in arguments or arguments[0] in RUNS:
            assert saved
            run_dry(arguments, model, folder)
            run += 1
    assert load_settings(folder / "my.yaml").run.dir == "runs/first"
    assert run == {"one_node.md": 2, "slurm.md": 3}[guide]
    printed = capsys.readouterr().out
    assert not [text for text in SAYS[guide] if text not in printed]


def kept_gb(guide: str, folder: Path) -> dict[str, list[float]]:
    """GB of each checkpoint and export of the real model that the guide's run keeps."""
    model = folder_of(find_model("qwen3_8b")[1])  # its config.json
    run_dry(next(each for each in commands(guide) if each[0] == "init"), model, folder)
    save_files(guide, folder, model=model)
    settings = load_settings(folder / "my.yaml")
    run, shape = settings.run, make_plan(settings, processes=8, gpu_memory=80 * 10**9).shape
    due = {task: [step for step in range(1, 101) if task in due_after(step, run)] for task in ("checkpoint", "export")}
    gone = expired_checkpoints(due["checkpoint"], run)
    sizes = {"checkpoint": checkpoint_bytes(settings, shape) / 1e9, "export": 2 * shape.num_parameters / 1e9}
    return {task: [sizes[task] for step in due[task] if task == "export" or step not in gone] for task in due}


@pytest.mark.parametrize("guide", SAYS)
def test_the_room_on_the_disk_that_a_guide_names(guide, tmp_path):
    kept, text = kept_gb(guide, tmp_path), " ".join((GUIDES / guide).read_text().split())
    each = {task: f"{sizes[0]:.0f} GB" for task, sizes in kept.items()}
    assert each == {"checkpoint": "19 GB", "export": "16 GB"}
    assert len(kept["export"]) == 4
    if guide == "one_node.md":
        assert len(kept["checkpoint"]) == 4
        assert "A checkpoint of this run takes 19 GB and an export 16 GB." in text
        assert f"which is {sum(map(sum, kept.values())):.0f} GB" in text
    else:
        assert len(kept["checkpoint"]) == 2
        assert "One takes 19 GB, and `keep_last` keeps the two newest" in text
        assert "The exports stay and take 16 GB each." in text


def test_the_memory_that_the_dry_run_prints(tmp_path):
    model = folder_of(find_model("qwen3_8b")[1])  # its config.json
    run_dry(next(each for each in commands("one_node.md") if each[0] == "init"), model, tmp_path)
    save_files("one_node.md", tmp_path, model=model)
    settings = load_settings(tmp_path / "my.yaml")
    printed = "\n".join(make_plan(settings, processes=8, gpu_memory=80 * 10**9).lines(settings))
    training, sampling = (re.search(rf"{kind} (\S+ GB) a rank", printed)[1] for kind in ("training", "sampling"))
    said = f"({training} in training, and {sampling} in an evaluation with its long answers)"
    assert said in " ".join((GUIDES / "one_node.md").read_text().split())


def test_transformer_engine_is_built_for_the_torch_that_is_installed():
    """Its part for PyTorch imports torch while it is built: the guides install both as the containers do."""
    script = (ROOT / "examples" / "containers" / "install.sh").read_text()
    tools = shlex.split(re.search(r"^    pip --upgrade pip (.*)$", script, re.MULTILINE)[1])
    for guide in ("one_node.md", "slurm.md"):
        before, install = re.search(r"^(.*)\n(.*\[gpu.*)$", (GUIDES / guide).read_text(), re.MULTILINE).groups()
        assert shlex.split(install) == ["pip", "install", "--no-build-isolation", "-e", ".[gpu,tensorboard]"]
        assert sorted(shlex.split(before)) == sorted(["pip", "install", "torch", *tools])
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for line in re.findall(r".*pip install.*\[gpu.*", page.read_text()):
            assert "--no-build-isolation" in line, page


def test_what_the_slurm_guide_changes_later(folder, model):
    """Its table names overrides for the command of step 4."""
    changes = re.findall(r"the command of step 4 with `([^`]+)` after `my.yaml`", (GUIDES / "slurm.md").read_text())
    assert len(changes) == 2
    (init, *_), (dry, *_) = ([each for each in commands("slurm.md") if name in each] for name in ("init", "--dry-run"))
    run_dry(init, model, folder)
    save_files("slurm.md", folder, model=model)
    for change in changes:
        run_dry([*dry[:3], *change.split(), *dry[3:]], model, folder)


def test_a_launch_without_a_dry_run_is_one_that_was_looked_at():
    """The guide's command to submit is the one that it has shown with --dry-run."""
    launches = [arguments for arguments in commands("slurm.md") if arguments[0] == "launch"]
    dry, submit, *_ = launches
    assert dry == [*submit, "--dry-run"]
    assert list(takewhile(lambda word: not word.startswith("--"), submit)) == ["launch", "slurm", "my.yaml"]
