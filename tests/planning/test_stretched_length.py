"""The plan of a model that YaRN stretches: its limits and its cache are those of the stretched length."""

import json

import pytest

from megatron_paint.base.errors import UserError
from megatron_paint.config.settings import DataSettings, ModelSettings, RolloutSettings, RunSettings, Settings
from megatron_paint.planning.memory import make_plan

QWEN3_8B = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def plan(folder, *, rollout, **config):
    (folder / "config.json").write_text(json.dumps(QWEN3_8B | config))
    settings = Settings(
        model=ModelSettings(hf_path=str(folder)),
        data=DataSettings(train="unused"),
        run=RunSettings(dir="unused"),
        rollout=rollout,
    )
    return make_plan(settings, processes=1)


def test_responses_beyond_max_position_embeddings(tmp_path):
    """The data check compares rollout.max_new_tokens and the prompts with this number."""
    rollout = RolloutSettings(max_new_tokens=100_000)
    assert plan(tmp_path, rollout=rollout, rope_scaling=YARN).shape.max_positions == 131_072
    assert plan(tmp_path, rollout=rollout).shape.max_positions == 40_960


def test_the_cache_holds_one_response_of_the_stretched_length(tmp_path):
    """Keys and values of 36 layers x 8 groups x 128 numbers in bfloat16, for 131,072 tokens."""
    needed = 2 * 36 * 8 * 128 * 2 * 131_072
    plan(tmp_path, rollout=RolloutSettings(cache_bytes=needed), rope_scaling=YARN)
    with pytest.raises(UserError, match="one response of 131,072 positions take on a rank: 19,327,352,832"):
        plan(tmp_path, rollout=RolloutSettings(cache_bytes=needed - 1), rope_scaling=YARN)
