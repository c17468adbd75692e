"""Spellings of config.json: what `transformers` reads is read alike, and what has two readings is refused."""

import json

import pytest
import torch
from transformers import AutoConfig, Qwen3ForCausalLM

from megatron_paint.base.errors import UserError
from megatron_paint.mcore.rotary import attention_scale, inverse_frequencies
from megatron_paint.models.qwen3.shape import read_shape

BASE = {
    "model_type": "qwen3",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
}
STRETCHED = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
FOUR = {"rope_theta": 1e6}  # the base, as transformers 4 writes it


def write(folder, **config):
    (folder / "config.json").write_text(json.dumps(BASE | config))
    return folder


YARNS = {
    "rope_scaling": FOUR | {"rope_scaling": STRETCHED},
    "older name of the type": FOUR | {"rope_scaling": {"type": "yarn", "factor": 2.0}},
    "both names of the type": FOUR | {"rope_scaling": STRETCHED | {"type": "yarn"}},
    "rope_parameters": {"rope_parameters": STRETCHED | {"rope_theta": 5e6}},
    "base beside rope_parameters": FOUR | {"rope_parameters": STRETCHED},
    "original length outside": FOUR
    | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 16384},
    "attention_factor": FOUR | {"rope_scaling": STRETCHED | {"attention_factor": 0.8}},
    "mscale": FOUR | {"rope_scaling": STRETCHED | {"mscale": 0.707, "mscale_all_dim": 1.3}},
    "mscale alone": FOUR | {"rope_scaling": STRETCHED | {"mscale": 0.707, "mscale_all_dim": 0}},
    "betas": FOUR | {"rope_scaling": STRETCHED | {"beta_fast": 20, "beta_slow": 2.5}},
    "betas of 0": FOUR | {"rope_scaling": STRETCHED | {"beta_fast": 0, "beta_slow": None}},
    "no truncation": FOUR | {"rope_scaling": STRETCHED | {"truncate": False}},
    "odd factor": FOUR | {"rope_scaling": STRETCHED | {"factor": 3.7}},
    "factor of 1": FOUR | {"rope_scaling": STRETCHED | {"factor": 1}},
    "ramp of no width": FOUR | {"rope_scaling": STRETCHED | {"beta_fast": 7, "beta_slow": 7, "truncate": False}},
    "keys without a value": FOUR | {"rope_scaling": STRETCHED | {"attention_factor": None, "short_factor": None}},
    "small head": FOUR | {"head_dim": 8, "rope_scaling": STRETCHED | {"original_max_position_embeddings": 64}},
}
PLAIN = {
    "transformers 4": FOUR | {"rope_scaling": None},
    "transformers 5": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e6}},
    "a base that was left": {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 5e6}},
    "base outside": {"rope_theta": 1e6, "rope_parameters": {"rope_type": "default"}},
    "empty": {"rope_theta": 1e6, "rope_parameters": {}, "rope_scaling": {}},
}


@pytest.mark.parametrize("config", (YARNS | PLAIN).values(), ids=YARNS | PLAIN)
def test_frequencies_and_scale_are_those_of_transformers(config, tmp_path):
    shape = read_shape(write(tmp_path, **config))
    theirs = Qwen3ForCausalLM(AutoConfig.from_pretrained(tmp_path)).model.rotary_emb
    assert torch.equal(inverse_frequencies(shape), theirs.inv_freq)
    scale = attention_scale(shape)
    assert (scale is None) == (theirs.rope_type == "default")
    if scale is not None:
        assert scale == pytest.approx(theirs.attention_scaling**2 / shape.head_dim**0.5, rel=1e-12)


def test_positions_at_the_end_of_131072(tmp_path):
    """Cosine and sine of our angles, times the attention factor, at the far end of a stretched model."""
    shape = read_shape(write(tmp_path, **YARNS["rope_scaling"]))
    theirs = Qwen3ForCausalLM(AutoConfig.from_pretrained(tmp_path)).model.rotary_emb
    position_T = torch.arange(131_000, 131_072)
    cos, sin = theirs(torch.zeros(()), position_T[None])
    angles = position_T.float()[:, None] * inverse_frequencies(shape)
    for found, wanted in ((angles.cos(), cos), (angles.sin(), sin)):
        wanted_TD = wanted[0, :, : shape.head_dim // 2]
        assert (found * shape.yarn.attention_factor - wanted_TD).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        (YARNS["rope_scaling"], 131_072),  # as Qwen3's cards write it: max_position_embeddings stays at 40960
        (YARNS["rope_scaling"] | {"max_position_embeddings": 131_072}, 131_072),
        (YARNS["rope_parameters"] | {"max_position_embeddings": 32_768}, 131_072),
        (YARNS["original length outside"], 65_536),
        (YARNS["factor of 1"], 40_960),
        (YARNS["older name of the type"], 40_960),  # no original length: perhaps 40960 is the stretched one
        (PLAIN["transformers 4"], 40_960),
    ],
)
def test_the_longest_sequence(config, positions, tmp_path):
    assert read_shape(write(tmp_path, **config)).max_positions == positions


def scaling(**change):
    return FOUR | {"rope_scaling": STRETCHED | change}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (scaling(rope_type="linear"), "rope_type 'linear'; only 'default' and 'yarn'"),
        (scaling(rope_type="dynamic"), "rope_type 'dynamic'; only 'default' and 'yarn'"),
        (scaling(rope_type="longrope"), "rope_type 'longrope'; only 'default' and 'yarn'"),
        (scaling(rope_type="llama3"), "rope_type 'llama3'; only 'default' and 'yarn'"),
        (scaling(rope_type=None), "rope_type None; only 'default' and 'yarn'"),
        (scaling(rope_type=["yarn"]), r"rope_type \['yarn'\]; only 'default' and 'yarn'"),
        (scaling(type="linear"), "rope_type 'yarn' and type 'linear'; keep the right one"),
        (scaling(scale_base=2), "rope_scaling has scale_base, which rope_type 'yarn' does not use"),
        (FOUR | {"rope_scaling": {"factor": 4.0}}, "rope_scaling has factor, which rope_type 'default' does not use"),
        (
            {"rope_parameters": {"rope_theta": 1e6, "mrope_section": [1], "mrope_interleaved": True}},
            "rope_parameters has mrope_interleaved, mrope_section, which rope_type 'default' does not use",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}},
            "rope_parameters has full_attention; rotary positions by kind of layer",
        ),
        (
            {"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": {"rope_type": "default"}},
            "rope_scaling beside rope_parameters",
        ),
        (scaling(rope_theta=5e6), "rope_theta 1000000.0 and, in rope_scaling, 5000000.0; keep the right one"),
        (
            scaling() | {"original_max_position_embeddings": 4096},
            "original_max_position_embeddings 32768, and the config itself 4096; keep the right one",
        ),
        (scaling(factor=0.5), "factor 0.5; it must be at least 1"),
        (scaling(factor="4"), "factor '4'; it must be a positive number"),
        (scaling(factor=None), "factor None; it must be a positive number"),
        (scaling(factor=float("inf")), "factor inf; it must be a positive number"),
        (scaling(attention_factor=0), "attention_factor 0; it must be a positive number"),
        (scaling(mscale=-1), "mscale -1; it must be a positive number"),
        (scaling(beta_fast=1, beta_slow=32), "beta_fast 1 below beta_slow 32"),
        (scaling(truncate=None), "truncate None; it must be true or false"),
        (scaling(original_max_position_embeddings=32768.5), "32768.5; it must be a whole number"),
        ({"rope_theta": 0.5, "rope_scaling": STRETCHED}, "rope_theta=0.5; YaRN needs a number above 1"),
        ({"rope_theta": "1000000"}, "rope_theta '1000000'; it must be a positive number"),
        ({"rope_theta": True}, "rope_theta True; it must be a positive number"),
        ({"rope_parameters": {"rope_type": "default"}}, "no key 'rope_theta'"),
        (FOUR | {"rope_scaling": [4]}, "rope_scaling is .4.. not a dictionary"),
        (FOUR | {"partial_rotary_factor": 0.5}, "only a part of each head"),
        (scaling(partial_rotary_factor=0.5), "only a part of each head"),
    ],
)
def test_refused_rotary_positions(config, message, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        read_shape(write(tmp_path, **config))
    assert str(caught.value).startswith(str(tmp_path / "config.json"))


def test_the_type_of_the_weights_as_torch_prints_it(tmp_path):
    assert read_shape(write(tmp_path, **FOUR, torch_dtype="torch.bfloat16")).dtype == "bfloat16"


@pytest.mark.parametrize("content", ["[]", "3", "null", '"qwen3"'])
def test_a_config_that_is_not_an_object(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json is not a JSON object; copy the checkpoint again$"):
        read_shape(tmp_path)
