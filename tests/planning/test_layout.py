"""The layout of the ranks: a suggested parallel size is valid for everything that is split."""

import json

import pytest

from megatron_paint.base.errors import UserError
from megatron_paint.config.settings import MegatronSettings, ModelSettings, RolloutSettings
from megatron_paint.planning.layout import check_model

SIZES = {
    "model_type": "qwen3",
    "vocab_size": 960,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}


def check(folder, *, tp: int = 1, pp: int = 1, **changes: int):
    (folder / "config.json").write_text(json.dumps(SIZES | changes))
    megatron = MegatronSettings(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    return check_model(ModelSettings(hf_path=str(folder)), megatron, RolloutSettings())


@pytest.mark.parametrize(
    ("tp", "changes", "nearest"),
    [
        (8, {}, 2),  # 4 heads and 2 groups: 4 would divide the heads alone
        (4, {}, 2),
        (3, {}, 2),
        (6, {"num_attention_heads": 12, "num_key_value_heads": 12}, 4),  # 64 of the feed-forward layer
        (16, {"num_attention_heads": 40, "num_key_value_heads": 8}, 8),
        (5, {"num_attention_heads": 3, "num_key_value_heads": 3}, 1),
    ],
)
def test_the_suggested_tensor_parallel_size_holds(tp, changes, nearest, tmp_path):
    with pytest.raises(UserError, match=rf"=\d+ does not divide .*; the nearest that fits the model is {nearest}$"):
        check(tmp_path, tp=tp, **changes)
    assert check(tmp_path, tp=nearest, **changes).num_layers == 6


def test_the_suggested_pipeline_parallel_size_holds(tmp_path):
    with pytest.raises(UserError, match=r"size=4 does not divide the number of layers, 6, .* fits the model is 3$"):
        check(tmp_path, pp=4)
    check(tmp_path, pp=3)
