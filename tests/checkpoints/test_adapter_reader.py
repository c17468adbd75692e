"""Adapters that PEFT has written: merged slice by slice like PEFT's own merge, or refused by name."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Qwen3Config, Qwen3ForCausalLM

from megatron_paint.base.errors import UserError
from megatron_paint.checkpoints.adapter_reader import Adapter
from megatron_paint.checkpoints.hf_reader import HuggingFaceReader
from megatron_paint.config.settings import LoraSettings
from megatron_paint.models.qwen3.mapping import hugging_face_shapes
from megatron_paint.models.qwen3.shape import read_shape

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SUPPORTED = {
    "plain": {"target_modules": ALL},
    "two projections": {"target_modules": ["q_proj", "v_proj"]},
    "by a regular expression": {"target_modules": r".*\.1\.mlp\.(up|down)_proj"},
    "all linear layers": {"target_modules": "all-linear"},
    "one layer": {"target_modules": ALL, "layers_to_transform": [1]},
    "rank-stabilised": {"target_modules": ALL, "use_rslora": True},
    "patterns": {
        "target_modules": ALL,
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 5, "0.self_attn.v_proj": 3},
        "alpha_pattern": {"down_proj": 3, "q_proj": 7},
    },
    "patterns, rank-stabilised": {"target_modules": ALL, "use_rslora": True, "rank_pattern": {"mlp.down_proj": 2}},
    "DoRA": {"target_modules": ALL, "use_dora": True},
    "DoRA, rank-stabilised, patterns": {
        "target_modules": ALL,
        "use_dora": True,
        "use_rslora": True,
        "rank_pattern": {"o_proj": 2},
    },
    "modules to save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens", "norm"]},
    "output layer": {"target_modules": ["lm_head", "o_proj"]},
    "other start values": {"target_modules": ALL, "init_lora_weights": "gaussian"},
    "orthogonal start": {"target_modules": ALL, "init_lora_weights": "orthogonal"},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folders = {}
    for tied in (True, False):
        torch.manual_seed(1)
        folders[tied] = tmp_path_factory.mktemp("base") / "model"
        Qwen3ForCausalLM(Qwen3Config(**SIZES, tie_word_embeddings=tied)).save_pretrained(folders[tied])
    return folders


def make_adapter(base, folder, **config):
    """An adapter of PEFT whose every tensor is random."""
    torch.manual_seed(2)
    model = get_peft_model(Qwen3ForCausalLM.from_pretrained(base), LoraConfig(**{"r": 4, "lora_alpha": 6} | config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
            assert parameter.requires_grad == any(key in name for key in ("lora_", "modules_to_save")), name
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("case", SUPPORTED)
def test_merged_as_peft_merges(case, bases, tmp_path):
    base = bases[False]
    folder = make_adapter(base, tmp_path / "adapter", **SUPPORTED[case])
    merged = PeftModel.from_pretrained(Qwen3ForCausalLM.from_pretrained(base), folder).merge_and_unload().state_dict()
    shape = read_shape(base)
    reader = HuggingFaceReader(base, shape)
    read = Adapter(folder, shape).merged(reader)
    changed = 0
    for name, size in hugging_face_shapes(shape).items():
        wanted = merged[name]
        torch.testing.assert_close(read(name), wanted, rtol=1e-6, atol=1e-6, msg=f"{case}: {name}")
        rows = slice(3, size[0] - 2)
        torch.testing.assert_close(read(name, rows=rows), wanted[rows], rtol=1e-6, atol=1e-6)
        if len(size) == 2:
            columns = slice(8, 24)
            found = read(name, rows=rows, columns=columns)
            torch.testing.assert_close(found, wanted[rows, columns], rtol=1e-6, atol=1e-6)
        changed += not torch.equal(wanted, reader(name))
    assert changed > 0


def test_merged_in_float32(bases, tmp_path):
    """Against float64, from A and B themselves."""
    folder = make_adapter(bases[False], tmp_path / "adapter", target_modules=["q_proj"])
    shape = read_shape(bases[False])
    name = "model.layers.0.self_attn.q_proj.weight"
    adapter, reader = Adapter(folder, shape), HuggingFaceReader(bases[False], shape)
    a_KI, b_OK = adapter.pair(name)
    assert adapter.scale(name) == 1.5
    wanted = (reader(name).double() + 1.5 * b_OK.double() @ a_KI.double()).float()
    torch.testing.assert_close(adapter.merged(reader)(name), wanted, rtol=1e-6, atol=1e-6)
    assert adapter.pair("model.layers.0.self_attn.k_proj.weight") is None


CONFIGS = {
    "prompt tuning": ({"peft_type": "PROMPT_TUNING"}, "peft_type 'PROMPT_TUNING'"),
    "biases": ({"bias": "all"}, "bias='all'"),
    "biases of the adapters": ({"lora_bias": True}, "lora_bias=True"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4' also changed the weights"),
    "OLoRA": ({"init_lora_weights": "olora"}, "init_lora_weights='olora' also changed the weights"),
    "target_parameters": ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters names experts, and"),
    "layers repeated": ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication=[[0, 2], [1, 2]]"),
    "tokens": ({"trainable_token_indices": [5]}, "trainable_token_indices=[5]"),
    "activated": ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens=[1]"),
    "quantised": ({"use_qalora": True}, "use_qalora=True"),
    "transposed": ({"fan_in_fan_out": True}, "fan_in_fan_out=True"),
    "a key of later versions": ({"lora_of_tomorrow": {"x": 1}}, "lora_of_tomorrow={'x': 1}"),
    "no rank": ({"r": 0}, "rank below 1"),
    "not a number": ({"lora_alpha": "many"}, "is not the config of a LoRA adapter"),
    "a broken pattern": ({"rank_pattern": {"(": 2}}, "is not the config of a LoRA adapter"),
    "another rank": ({"r": 5}, "has shape (4, 32), but config and model expect (5, 32)"),
    "more targets": ({"target_modules": ["q_proj", "k_proj"]}, "k_proj.lora_A is missing"),
    "no DoRA": ({"use_dora": True}, "lora_magnitude_vector is missing"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, "base_model.model.lm_head is missing"),
}


@pytest.fixture(scope="module")
def adapter(bases, tmp_path_factory):
    return make_adapter(bases[False], tmp_path_factory.mktemp("adapter"), target_modules=["q_proj"])


@pytest.mark.parametrize("case", CONFIGS)
def test_refused_by_name(case, adapter, bases, tmp_path):
    changes, says = CONFIGS[case]
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UserError) as caught:
        Adapter(folder, read_shape(bases[False]))
    assert says in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damaged_files_are_named(adapter, bases, tmp_path):
    shape = read_shape(bases[False])
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"adapter_model.safetensors is truncated or not a safetensors file"):
        Adapter(folder, shape)
    file.unlink()
    with pytest.raises(UserError, match=r"no adapter_model.safetensors; copy the adapter again"):
        Adapter(folder, shape)
    (folder / "adapter_model.bin").touch()
    with pytest.raises(UserError, match=r"adapter_model.bin; save the adapter as safetensors"):
        Adapter(folder, shape)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match=r"adapter_config.json is not the config of a LoRA adapter"):
        Adapter(folder, shape)


def test_a_frozen_copy_of_a_tied_embedding_is_read(bases, tmp_path):
    """PEFT and trainers on it save embedding and output layer beside the adapters when the vocabulary was resized."""
    torch.manual_seed(2)
    model = get_peft_model(Qwen3ForCausalLM.from_pretrained(bases[True]), LoraConfig(r=4, target_modules=["q_proj"]))
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(1)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    shape = read_shape(bases[True])
    read = Adapter(tmp_path / "adapter", shape).merged(HuggingFaceReader(bases[True], shape))
    merged = PeftModel.from_pretrained(Qwen3ForCausalLM.from_pretrained(bases[True]), tmp_path / "adapter")
    wanted = merged.merge_and_unload().state_dict()
    for name in hugging_face_shapes(shape):
        torch.testing.assert_close(read(name), wanted[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("key", ["modules_to_save", "target_modules"])
def test_a_tied_output_layer_cannot_be_changed_alone(key, bases, tmp_path):
    config = {"target_modules": ["q_proj", "lm_head"] if key == "target_modules" else ["q_proj"]}
    config |= {"modules_to_save": ["lm_head"]} if key == "modules_to_save" else {}
    folder = make_adapter(bases[True], tmp_path / "adapter", **config)
    with pytest.raises(UserError, match="ties embedding and output layer"):
        Adapter(folder, read_shape(bases[True]))


CONTINUED = {
    "another rank": ({}, {"rank": 8, "alpha": 12}, "set model.lora.rank=4 model.lora.alpha=6, or leave model.lora out"),
    "another scale": ({}, {"rank": 4, "alpha": 8}, "set model.lora.rank=4 model.lora.alpha=6"),
    "rank-stabilised": ({"use_rslora": True}, {"rank": 4, "alpha": 6}, "set model.lora.rank=4 model.lora.alpha=12"),
    "DoRA": ({"use_dora": True}, {"rank": 4, "alpha": 6}, "has use_dora"),
    "saved modules": (
        {"modules_to_save": ["norm"]},
        {"rank": 4, "alpha": 6},
        "the complete weights of model.layers.0.input_layernorm.weight (modules_to_save)",
    ),
    "ranks": ({"rank_pattern": {"q_proj": 2}}, {"rank": 4, "alpha": 6}, "modules of different rank or scale"),
    "output layer": ({"target_modules": ["q_proj", "lm_head"]}, {"rank": 4, "alpha": 6}, "adapts lm_head.weight"),
}


@pytest.mark.parametrize("case", CONTINUED)
def test_a_run_of_adapters_that_cannot_continue_is_told(case, bases, tmp_path):
    config, lora, says = CONTINUED[case]
    folder = make_adapter(bases[False], tmp_path / "adapter", **{"target_modules": ["q_proj", "v_proj"]} | config)
    adapter = Adapter(folder, read_shape(bases[False]))
    with pytest.raises(UserError) as caught:
        adapter.check_continues(LoraSettings(**lora))
    assert says in str(caught.value)
    if "set model.lora.rank" in says:
        adapter.check_continues(LoraSettings(rank=4, alpha=12.0 if case == "rank-stabilised" else 6.0))
