"""A preset as one file: the values of its chain of bases, and their comments."""

import re

import pytest
from ruamel.yaml import YAML

from megatron_paint.base.errors import UserError
from megatron_paint.config import examples
from megatron_paint.config.load import load_settings, read_tree
from megatron_paint.config.resolve import resolved_preset

PRESETS = [(size, objective) for size in examples.sizes() for objective in examples.objectives(size)]
BASE = """\
# The recipe.
#
# Run the file of a size:
#   megatron-paint train examples/qwen3_8b/paint.yaml

model:
  dtype: bfloat16
  lora: {rank: 64, alpha: 128}

objective:
  name: paint      # the method
  loss:
    clip: 0.06     # null: no clip; a limit that is far too long for one line of 120 columns, so that its comment has to
                   # be written above it
  reveal: {rule: overlap, minimum: 0.30}

optimizer:
  lr: 5.0e-6       # peak
"""
BETWEEN = """\
# A baseline.
#
# Run the file of a size:
#   megatron-paint train examples/qwen3_8b/opsd.yaml
base: paint.yaml

objective: # what changes
  name: opsd
  reveal: {rule: full}
"""
SIZE = """\
# One size. The base holds the recipe and explains it. Not measured.
#   megatron-paint train examples/qwen3_8b/opsd.yaml \\
#       model.hf_path=/models/Qwen3-8B
base: ../qwen3_base/opsd.yaml

model: {hf_path: Qwen3-8B} # a folder
objective: {loss: {clip: null}} # none here
run: {dir: "runs/a: b", tags: [1, 2.50]}
"""
RESOLVED = """\
# One size. Not measured.
#   megatron-paint train SETTINGS.yaml \\
#       model.hf_path=/models/Qwen3-8B
#
# A baseline.
#
# The recipe.

model:
  dtype: bfloat16
  lora: {rank: 64, alpha: 128}
  hf_path: Qwen3-8B # a folder

objective: # what changes
  name: opsd # the method
  loss:
    clip: null # none here
  reveal: {rule: full, minimum: 0.30}

optimizer:
  lr: 5.0e-6 # peak

run:
  dir: 'runs/a: b'
  tags: [1, 2.50]
"""


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A folder of examples with one size and a chain of three files."""
    for name, text in (("paint", BASE), ("opsd", BETWEEN)):
        (tmp_path / "examples" / "qwen3_base").mkdir(parents=True, exist_ok=True)
        (tmp_path / "examples" / "qwen3_base" / f"{name}.yaml").write_text(text)
    (tmp_path / "examples" / "qwen3_8b").mkdir()
    (tmp_path / "examples" / "qwen3_8b" / "opsd.yaml").write_text(SIZE)
    (tmp_path / "examples" / "qwen3_8b" / "paint.yaml").write_text("base: ../qwen3_base/paint.yaml\n")
    monkeypatch.setattr(examples, "PACKAGE", tmp_path / "megatron_paint")
    return tmp_path


def test_a_chain_becomes_one_file(made):
    assert resolved_preset("qwen3_8b", "opsd") == RESOLVED


def test_a_long_comment_stands_above_its_setting(made):
    lines = resolved_preset("qwen3_8b", "paint").splitlines()
    at = lines.index("    clip: 0.06")
    assert " ".join(line.strip().removeprefix("# ") for line in lines[at - 2 : at]) == (
        "null: no clip; a limit that is far too long for one line of 120 columns, so that its comment has to be "
        "written above it"
    )


@pytest.mark.parametrize(("size", "objective"), PRESETS)
def test_every_preset_keeps_its_values(size, objective, tmp_path):
    text = resolved_preset(size, objective)
    (tmp_path / "my.yaml").write_text(text)
    preset = examples.preset_file(size, objective)
    assert YAML(typ="safe", pure=True).load(text) == read_tree(preset)
    assert load_settings(tmp_path / "my.yaml") == load_settings(preset)
    assert max(map(len, text.splitlines())) <= 120
    assert "examples/" not in text
    assert not re.search(r"^base:", text, re.MULTILINE)


@pytest.mark.parametrize(("size", "objective"), PRESETS)
def test_every_preset_keeps_its_comments(size, objective):
    """Each comment of the preset and of its nearest base is there, unless the preset comments on the same setting."""
    text = " ".join(re.sub(r"\s*#\s*", " ", resolved_preset(size, objective)).split())
    preset = examples.preset_file(size, objective)
    base = preset.parent / re.search(r"^base: (\S+)", preset.read_text(), re.MULTILINE)[1]
    own, below = (re.findall(r"^([^#\n]*\S) +# (.+)$", file.read_text(), re.MULTILINE) for file in (preset, base))
    replaced = {key for line, _ in own for key in re.findall(r"\w+(?=:)", line)} | {"base"}
    below = [(line, comment) for line, comment in below if re.search(r"\w+(?=:)", line)[0] not in replaced]
    assert own
    for _, comment in (*own, *below):
        assert " ".join(comment.split()) in text


def test_sizes_are_in_order_and_paint_is_first():
    assert examples.sizes() == [
        "qwen3_1p7b",
        "qwen3_4b",
        "qwen3_8b",
        "qwen3_14b",
        "qwen3_30b_a3b",
        "qwen3_32b",
        "qwen3_235b_a22b",
    ]
    assert examples.objectives("qwen3_8b") == ["paint", "grpo", "opsd", "reference_free", "sft", "support"]


@pytest.mark.parametrize(
    ("size", "objective", "says"),
    [
        ("Qwen3-1.7B", "paint", "unknown model size 'Qwen3-1.7B': did you mean qwen3_1p7b?"),
        ("llama", "paint", "unknown model size 'llama': choose from qwen3_1p7b, qwen3_4b"),
        ("qwen3_base", "paint", "unknown model size 'qwen3_base'"),
        ("qwen3_8b", "pain", "unknown objective 'pain' for qwen3_8b: did you mean paint?"),
        ("qwen3_235b_a22b", "reference_free", "choose from paint, grpo, opsd, sft, support"),
    ],
)
def test_an_unknown_name_is_one_line_with_near_names(size, objective, says):
    with pytest.raises(UserError) as error:
        resolved_preset(size, objective)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_an_installation_without_presets_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(examples, "PACKAGE", tmp_path)
    with pytest.raises(UserError, match="has no presets and no quickstart: install it again"):
        examples.sizes()
