"""The recipe pages: their numbers are those of the README, which has its own test, and of the planner's command."""

import importlib
import re
import sys
from pathlib import Path

import pytest

from megatron_paint.cli.main import main
from megatron_paint.config.examples import objectives, sizes

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))
recipe_pages = importlib.import_module("recipe_pages")

README_ROW = re.compile(r"^\| (Qwen3-\S+) \| 8 \| (\d+) x (\d+) \| (\S+) \| (\S+) \|", re.MULTILINE)
DENSE = {model: numbers for model, *numbers in README_ROW.findall((ROOT / "README.md").read_text())}


def rows(size: str, section: str) -> list[list[str]]:
    """The cells of the table of a section of a recipe."""
    text = (ROOT / "docs" / "recipes" / f"{size}.md").read_text().split(f"## {section}\n")[1].split("\n## ")[0]
    return [line.strip("| \n").split(" | ") for line in text.splitlines() if line.startswith("| ")][2:]


@pytest.mark.parametrize("size", [size for size in sizes() if recipe_pages.head_of(size)[0] in DENSE])
def test_the_memory_is_that_of_the_readme(size):
    model, gpus = recipe_pages.head_of(size)
    tensor, _, paint, grpo = DENSE[model]
    assert gpus == 8
    peaks = {
        row[0].split("]")[0][1:]: max(float(cell) for cell in row[2:4] if cell != "-") for row in rows(size, "Presets")
    }
    assert (peaks["paint"], peaks["grpo"]) == (float(paint), float(grpo))
    text = (ROOT / "docs" / "recipes" / f"{size}.md").read_text()
    assert f"tensor {tensor} x data" in text if tensor != "1" else "8 GPUs: data 8." in text


def test_the_host_memory_of_a_node_is_that_of_its_eight_ranks():
    """235B at TP 4 on two nodes, a stage on each. The first node: 8 processes, half of the weights in bfloat16, and 26
    bytes of each LoRA weight. q, k and v split their outputs and o its inputs over 4 ranks; the rest is on each."""
    adapters = 47 * 64 * (8192 + 2 * 512 + 8192 + 4 * (4 * 4096))
    node = 8 * 3e9 + 235_093_634_560 / 2 * 2 + adapters * (2 + 2 * 12)
    for row in rows("qwen3_235b_a22b", "Presets"):
        assert float(row[4]) == pytest.approx(node / 1e9, rel=1e-3)


def test_every_dense_size_is_compared():
    assert len(DENSE) == 5


@pytest.mark.parametrize("size", sizes())
def test_every_preset_has_a_row(size):
    assert [row[0].split("]")[0][1:] for row in rows(size, "Presets")] == objectives(size)


def test_the_fastest_layout_is_that_of_the_command(capsys):
    (command,) = re.findall(
        r"^megatron-paint (plan .*)$", (ROOT / "docs/recipes/qwen3_8b.md").read_text(), re.MULTILINE
    )
    assert main(command.replace("examples/", f"{ROOT}/examples/").split()) == 0
    printed = capsys.readouterr().out
    first, *_ = rows("qwen3_8b", "On more GPUs")
    (line,) = re.findall(r"^ *1  (.*)$", printed, re.MULTILINE)
    layout, saves, seconds, rollout, *_, gigabytes = re.split(r" {2,}", line)
    assert [layout, saves, seconds, rollout, gigabytes] == [*first[1:5], first[6]]
    assert f"{first[5]} trained tokens/s a GPU" in printed


def test_a_preset_without_its_first_line_is_an_error(monkeypatch, tmp_path):
    (tmp_path / "paint.yaml").write_text("# Qwen3-8B on some GPUs\n")
    monkeypatch.setattr(recipe_pages, "preset_file", lambda size, preset: tmp_path / f"{preset}.yaml")
    with pytest.raises(ValueError, match="names no model and no nodes"):
        recipe_pages.head_of("qwen3_8b")
