"""The public interface: the exact list of names, that each exists and is documented, and that it costs no import."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import megatron_paint
from megatron_paint.convert.check import compare
from tests.support import tiny

ROOT = Path(__file__).parents[1]
NAMES = [
    "Grpo",
    "InterpolationLossConfig",
    "Paint",
    "Policy",
    "Settings",
    "Sft",
    "ShardedVocab",
    "WholeVocab",
    "__version__",
    "convert_to_hf",
    "convert_to_megatron",
    "cut_solution",
    "fused_interpolation_loss",
    "grade",
    "interpolation_loss",
    "load_settings",
    "measure_overlap",
    "train",
]
# README.md shows these lines.
LOSS_ALONE = """\
import torch
from megatron_paint import InterpolationLossConfig, WholeVocab, fused_interpolation_loss, interpolation_loss

student, teacher, output = torch.randn(6, 8, requires_grad=True), torch.randn(6, 8), torch.randn(32, 8)
how = {"lengths": [4, 2], "config": InterpolationLossConfig(fraction=0.5), "vocab": WholeVocab()}
fused = fused_interpolation_loss(student, output, teacher, **how)
plain = interpolation_loss(student @ output.T, teacher @ output.T, **how)
fused.loss_T.sum().backward()
"""


def test_the_list():
    assert megatron_paint.__all__ == NAMES
    assert set(NAMES) <= set(dir(megatron_paint))


@pytest.mark.parametrize("name", NAMES)
def test_each_name_exists_and_is_documented(name):
    value = getattr(megatron_paint, name)
    if name == "__version__":
        assert value.count(".") == 2
        return
    assert value.__name__ == name
    assert len(inspect.getdoc(value)) > 20
    # A dataclass without a docstring gets its signature.
    assert not inspect.getdoc(value).startswith(f"{name}(")


def test_a_name_that_does_not_exist():
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        _ = megatron_paint.trian


def test_importing_the_package_imports_nothing_large():
    code = (
        "import sys, megatron_paint\n"
        "from megatron_paint import Settings, InterpolationLossConfig, cut_solution, grade, load_settings\n"
        "from megatron_paint import measure_overlap\n"
        "print(*sorted({'torch', 'transformers', 'megatron', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_the_version_is_a_line_that_setup_reads():
    lines = (ROOT / "megatron_paint" / "__init__.py").read_text().splitlines()
    (version,) = [line.split('"')[1] for line in lines if line.startswith("__version__")]
    assert version == megatron_paint.__version__


@pytest.mark.filterwarnings("ignore:the loss's elementwise work is done by torch")
def test_the_loss_alone():
    torch.manual_seed(0)
    names = {}
    exec(LOSS_ALONE, names)
    fused, plain, student = names["fused"], names["plain"], names["student"]
    assert fused.selected_T.tolist() == plain.selected_T.tolist()
    assert sum(fused.selected_T.tolist()) == 3  # half of each rollout
    torch.testing.assert_close(fused.loss_T, plain.loss_T)
    (gradient,) = torch.autograd.grad(plain.loss_T.sum(), student)
    torch.testing.assert_close(student.grad, gradient)


def test_conversions_there_and_back(tmp_path):
    model = tiny.make_model(tmp_path / "hf")
    megatron_paint.convert_to_megatron(model, tmp_path / "megatron")
    megatron_paint.convert_to_hf(str(tmp_path / "megatron"), str(tmp_path / "back"), base=model)
    assert compare(tmp_path / "back", tmp_path / "megatron", progress=lambda nbytes: None).equal
    with pytest.raises(ValueError, match="exists; remove it"):
        megatron_paint.convert_to_megatron(model, tmp_path / "megatron")
    with pytest.raises(ValueError, match="is not a folder"):
        megatron_paint.convert_to_hf(tmp_path / "nowhere", tmp_path / "out", base=model)
