"""`megatron-paint quickstart`: what it copies, what it runs, and when it refuses."""

import filecmp
import re
import shlex
from pathlib import Path

import pytest

from megatron_paint.base.errors import UserError
from megatron_paint.cli import train
from megatron_paint.cli.main import main
from megatron_paint.cli.quickstart import copy_quickstart
from megatron_paint.config.load import load_settings
from megatron_paint.config.saved import dotted
from megatron_paint.config.tree import settings_tree
from tests.support import finished
from tests.support.finished import ROOT

SHIPPED = ROOT / "examples" / "quickstart"
NAMES = ["a", "with space", "it's: #1", 'quote"s']


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("preset", ["paint", "grpo", "opsd", "sft"])
def test_the_copied_settings_are_the_shipped_ones_with_other_paths(tmp_path, name, preset):
    folder = tmp_path / name
    copy_quickstart(folder)
    copied = dotted(settings_tree(load_settings(folder / f"{preset}.yaml")))
    for key, value in dotted(settings_tree(load_settings(SHIPPED / f"{preset}.yaml"))).items():
        if isinstance(value, str) and value.startswith(("examples/quickstart/", "runs/")):
            value = str(folder / value.removeprefix("examples/quickstart/"))
            assert key == "run.dir" or (folder / value).is_file() or (folder / value).is_dir()
        assert copied[key] == value, key
    header = (folder / f"{preset}.yaml").read_text().split("\n\n")[0]
    assert "examples/" not in header


def test_all_files_are_copied_without_a_change(tmp_path):
    copy_quickstart(tmp_path / "a")
    names = [str(path.relative_to(SHIPPED)) for path in SHIPPED.rglob("*") if path.is_file() and path.suffix != ".yaml"]
    assert len(names) == 11
    assert filecmp.cmpfiles(SHIPPED, tmp_path / "a", names, shallow=False) == (names, [], [])
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_second_call_changes_nothing(tmp_path):
    copy_quickstart(tmp_path / "a")
    (tmp_path / "a" / "paint.yaml").write_text("run: {}\n")
    (tmp_path / "a" / "train.jsonl").unlink()
    copy_quickstart(tmp_path / "a")
    assert (tmp_path / "a" / "paint.yaml").read_text() == "run: {}\n"
    assert not (tmp_path / "a" / "train.jsonl").exists()


def test_a_second_call_prints_the_results_of_a_finished_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    copy_quickstart(tmp_path / "quickstart")
    settings = tmp_path / "quickstart" / "paint.yaml"
    settings.write_text(settings.read_text().replace("steps: 50", f"steps: {finished.STEPS}"))
    monkeypatch.setattr(finished, "quickstart", lambda _: load_settings(settings))
    run = finished.make_finished_run(tmp_path / "quickstart" / "runs" / "quickstart")
    monkeypatch.setattr(train, "_check_and_print_plan", None)  # what a run that is not finished does next
    assert main(["quickstart"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert f"{run.path} has all {finished.STEPS} steps with these settings: nothing is left to do" in out
    assert "100.0 %" in out  # the last evaluation


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "a").mkdir()
    copy_quickstart(tmp_path / "a")
    assert (tmp_path / "a" / "paint.yaml").is_file()


def test_another_folder_or_a_file_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for path in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(UserError, match="is not a quickstart"):
            copy_quickstart(path)
    with pytest.raises(UserError, match="cannot be written"):
        copy_quickstart(tmp_path / "notes.txt" / "a")
    with pytest.raises(UserError, match="cannot be printed"):
        copy_quickstart(tmp_path / "a\nb")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("given", "processes", "flags"),
    [([], 4, []), (["--processes", "2", "--json", "--dry-run"], 2, ["dry_run", "json"])],
)
def test_it_trains_with_the_copied_settings(tmp_path, monkeypatch, capsys, given, processes, flags):
    monkeypatch.chdir(tmp_path)
    calls = []
    monkeypatch.setattr(train, "run", lambda options, arguments: calls.append((options, arguments)) or 0)
    assert main(["quickstart", *given]) == 0
    ((options, arguments),) = calls
    assert options.config == tmp_path / "quickstart" / "paint.yaml"
    assert arguments[:4] == ["train", str(options.config), "--processes", str(processes)]
    assert options.processes == processes
    assert [name for name in ("dry_run", "quiet", "json") if getattr(options, name)] == flags
    out = capsys.readouterr().out
    assert out == "" if "json" in flags else f"megatron-paint train {options.config} --processes 4" in out


@pytest.mark.parametrize("page", ["wheel.md", "guides/laptop.md"])
def test_the_quickstarts_of_the_documents_start(page, tmp_path, monkeypatch):
    """Every command with its numbers of ranks, up to the start of the ranks."""
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^megatron-paint (quickstart.*)", (ROOT / "docs" / page).read_text(), re.MULTILINE)
    assert commands
    for command in commands:
        arguments = shlex.split(command.replace("/tmp/", f"{tmp_path}/"), comments=True)
        assert main([*arguments, "--dry-run"]) == 0, command


@pytest.mark.parametrize("preset", ["grpo", "opsd", "sft", "support"])
def test_the_second_line_of_a_preset_is_its_command(preset, tmp_path):
    copy_quickstart(tmp_path)
    command = (tmp_path / f"{preset}.yaml").read_text().splitlines()[1].removeprefix("#")
    assert shlex.split(command) == ["megatron-paint", "train", str(tmp_path / f"{preset}.yaml"), "--processes", "4"]
    for page in ("wheel.md", "guides/laptop.md"):
        assert "second line of each is" in (ROOT / "docs" / page).read_text()


def test_a_current_folder_that_is_empty_stays_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    copy_quickstart(tmp_path)
    assert Path("paint.yaml").is_file()
    assert Path.cwd() == tmp_path
