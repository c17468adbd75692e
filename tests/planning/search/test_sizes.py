"""The sizes in the package are the published ones, and a model is found by its name or its folder."""

import shutil

import pytest

from megatron_paint.base.errors import UserError
from megatron_paint.planning.search.sizes import FOLDER, find_model, known_sizes

WEIGHTS = {  # of the published checkpoints
    "qwen3_0p6b": 596_049_920,
    "qwen3_1p7b": 1_720_574_976,
    "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360,
    "qwen3_14b": 14_768_307_200,
    "qwen3_30b_a3b": 30_532_122_624,
    "qwen3_32b": 32_762_123_264,
    "qwen3_235b_a22b": 235_093_634_560,
}


def test_the_sizes_have_the_published_numbers_of_weights():
    assert known_sizes() == list(WEIGHTS)
    assert {name: find_model(name)[1].num_parameters for name in WEIGHTS} == WEIGHTS


@pytest.mark.parametrize("name", ["qwen3_30b_a3b", "Qwen3-30B-A3B", "Qwen/Qwen3-30B-A3B"])
def test_names_of_a_size(name):
    found, shape = find_model(name)
    assert (found, shape.num_experts, shape.experts_per_token) == ("qwen3_30b_a3b", 128, 8)
    assert find_model("Qwen3-1.7B")[0] == "qwen3_1p7b"


def test_a_folder_and_its_config(tmp_path):
    """A folder that is called like a size is the folder."""
    folder = tmp_path / "Qwen3-8B"
    shutil.copytree(FOLDER / "qwen3_4b", folder)
    for name in (str(folder), f"{folder}/", f"{folder}/config.json"):
        found, shape = find_model(name)
        assert (found, shape.num_layers, shape.hidden_size) == ("Qwen3-8B", 36, 2560)
        assert shape.source == str(folder / "config.json")


@pytest.mark.parametrize(
    ("name", "says"), [("qwen3_7b", "did you mean qwen3_"), ("llama", "known sizes are qwen3_0p6b")]
)
def test_an_unknown_name(name, says):
    with pytest.raises(UserError, match=says):
        find_model(name)
