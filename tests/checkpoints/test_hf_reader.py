"""Hugging Face folders as trainers leave them: other names, fused experts, two sets of weights, one tied tensor.

The values are those of the folder that `transformers` wrote, to the bit.
"""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_paint.base.errors import UserError
from megatron_paint.checkpoints.hf_reader import INDEX, SINGLE, HuggingFaceReader
from megatron_paint.checkpoints.hf_writer import write_tensors
from megatron_paint.cli.main import main
from megatron_paint.convert.check import compare, describe
from megatron_paint.convert.to_megatron import ToMegatron
from megatron_paint.convert.work import convert
from megatron_paint.models.qwen3.shape import read_shape
from tests.convert.family import make_member

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def store(folder, tensors, file=SINGLE):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / file, metadata={"format": "pt"})


def rewritten(folder, member, change, more=()):
    """A folder whose tensors went through `change`, and the tensors as `transformers` wrote them."""
    original = load_file(make_member(folder, member) / SINGLE)
    store(folder, {change(name): tensor for name, tensor in original.items()} | dict(more))
    return folder, original


def check_equal(folder, original):
    reader = HuggingFaceReader(folder, read_shape(folder))
    assert reader.tensors.keys() == original.keys()
    for name, tensor in original.items():
        assert torch.equal(reader(name), tensor), name
        assert torch.equal(reader(name, rows=slice(1, 3)), tensor[1:3]), name
    return reader


CHANGES = {
    "compile": lambda name: f"_orig_mod.{name}",
    "compiled layers": lambda name: name.replace(".mlp.", "._orig_mod.mlp."),
    "DDP around compile": lambda name: f"module._orig_mod.{name}",
    "FSDP": lambda name: name.replace("model.layers.1.", "model._fsdp_wrapped_module.layers.1._fsdp_wrapped_module."),
    "PEFT": lambda name: f"base_model.model.{name}",
    "no model": lambda name: name.removeprefix("model."),
    "a trainer's attribute": lambda name: f"policy.{name}",
    "a trainer's attribute called model": lambda name: f"model.{name}",
}


@pytest.mark.parametrize("member", ["dense-tied", "dense-untied", "moe"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_other_names(change, member, tmp_path):
    reader = check_equal(*rewritten(tmp_path / "m", member, change))
    assert reader.notes[0].endswith("and other names likewise")


def test_a_conversion_of_other_names(tmp_path):
    folder, original = rewritten(tmp_path / "m", "dense-untied", CHANGES["compile"])
    convert(ToMegatron(source=folder), tmp_path / "out", processes=1, overwrite=False)
    store(folder, original)
    assert compare(folder, tmp_path / "out").equal


def refusal(folder):
    with pytest.raises(UserError) as caught:
        HuggingFaceReader(folder, read_shape(folder))
    return str(caught.value)


def test_one_name_for_two_tensors_is_refused(tmp_path):
    more = {"_orig_mod.model.norm.weight": torch.ones(48, dtype=torch.bfloat16)}
    folder, _ = rewritten(tmp_path / "m", "dense-tied", str, more)
    message = refusal(folder)
    for part in ("model.norm.weight and", "_orig_mod.model.norm.weight", "are both model.norm.weight of the model"):
        assert part in message


def test_names_that_fit_nothing_stand_beside_the_missing_ones(tmp_path):
    """Adapters that are not merged, as PEFT's model has them in memory."""

    def wrapped(name):
        return f"base_model.model.{name.replace('q_proj.', 'q_proj.base_layer.')}"

    folder, _ = rewritten(tmp_path / "m", "dense-tied", wrapped)
    message = refusal(folder)
    assert "model.layers.0.self_attn.q_proj.weight is missing" in message
    assert "model.layers.0.self_attn.q_proj.base_layer.weight does not belong to the model" in message
    assert "is read as" in message


def test_two_models_in_a_folder_are_refused(tmp_path):
    original = load_file(make_member(tmp_path / "m", "dense-tied") / SINGLE)
    store(tmp_path / "m", {f"{who}.{name}": t.clone() for who in ("actor", "critic") for name, t in original.items()})
    message = refusal(tmp_path / "m")
    assert f"{EMBEDDING} is missing" in message
    assert f"actor.{EMBEDDING} does not belong to the model" in message


def fuse(tensors):
    """The experts as transformers 5 has them in memory."""
    fused = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for layer in range(4):
        stem = f"model.layers.{layer}.mlp.experts."
        gate, up, down = (
            torch.stack([tensors[f"{stem}{expert}.{name}.weight"] for expert in range(8)])
            for name in ("gate_proj", "up_proj", "down_proj")
        )
        fused |= {f"{stem}gate_up_proj": torch.cat((gate, up), dim=1), f"{stem}down_proj": down}
    return fused


def test_fused_experts(tmp_path):
    original = load_file(make_member(tmp_path / "m", "moe") / SINGLE)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    fused = fuse(original)
    for name, tensor in loaded.state_dict().items():  # the tensors of the test are those of transformers
        assert torch.equal(tensor, fused[name]), name
    store(tmp_path / "m", fused)
    reader = check_equal(tmp_path / "m", original)
    assert reader.notes == ["the experts of a layer are stored in fused tensors"]
    convert(ToMegatron(source=tmp_path / "m"), tmp_path / "out", processes=1, overwrite=False)
    assert compare(tmp_path / "m", tmp_path / "out").equal
    store(tmp_path / "m", original)
    assert compare(tmp_path / "m", tmp_path / "out").equal


def test_fused_experts_of_another_order_are_refused(tmp_path):
    """Some models have [experts, inputs, outputs]."""
    original = load_file(make_member(tmp_path / "m", "moe") / SINGLE)
    store(tmp_path / "m", {n: t.transpose(1, 2) if t.dim() == 3 else t for n, t in fuse(original).items()})
    assert "experts.0.down_proj.weight has shape (24, 48), but the config expects (48, 24)" in refusal(tmp_path / "m")


def test_fused_experts_beside_single_ones_are_refused(tmp_path):
    original = load_file(make_member(tmp_path / "m", "moe") / SINGLE)
    store(tmp_path / "m", original | {n: t for n, t in fuse(original).items() if n.endswith("gate_up_proj")})
    assert "are both model.layers.0.mlp.experts.0.gate_proj.weight of the model" in refusal(tmp_path / "m")


def test_a_tied_model_may_have_only_its_output_layer(tmp_path):
    folder, original = rewritten(tmp_path / "m", "dense-tied", lambda name: HEAD if name == EMBEDDING else name)
    reader = check_equal(folder, original)
    reader.check_tied(read_shape(folder))
    convert(ToMegatron(source=folder), tmp_path / "out", processes=1, overwrite=False)
    assert compare(folder, tmp_path / "out").equal
    assert describe(folder)["odd"] == [f"{HEAD} is read as the embedding, which the config ties to it"]
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(loaded.get_input_embeddings().weight, original[EMBEDDING])


def test_an_untied_model_needs_its_embedding(tmp_path):
    original = load_file(make_member(tmp_path / "m", "dense-untied") / SINGLE)
    store(tmp_path / "m", {name: tensor for name, tensor in original.items() if name != EMBEDDING})
    assert f"{EMBEDDING} is missing" in refusal(tmp_path / "m")


def write_index(folder, file_of):
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": file_of}))


@pytest.mark.parametrize("shards", ["complete", "gone", "damaged index"])
def test_the_single_file_is_read_before_an_index(shards, tmp_path):
    original = load_file(make_member(tmp_path / "m", "dense-tied") / SINGLE)
    names = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(original)}
    write_index(tmp_path / "m", names)
    if shards == "complete":
        for file in set(names.values()):
            store(tmp_path / "m", {name: 2 * original[name] for name in original if names[name] == file}, file)
    elif shards == "damaged index":
        (tmp_path / "m" / INDEX).write_text("{")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m") if shards != "damaged index" else None
    assert loaded is None or torch.equal(loaded.state_dict()[EMBEDDING], original[EMBEDDING])
    check_equal(tmp_path / "m", original)
    assert describe(tmp_path / "m")["odd"] == [f"{INDEX} is beside {SINGLE}; it is of other weights and is not read"]


def test_an_index_that_lists_the_single_file_is_read(tmp_path):
    original = load_file(make_member(tmp_path / "m", "dense-tied") / SINGLE)
    store(tmp_path / "m", {name: tensor for name, tensor in original.items() if name != EMBEDDING})
    store(tmp_path / "m", {EMBEDDING: original[EMBEDDING]}, "embedding.safetensors")
    write_index(tmp_path / "m", {n: "embedding.safetensors" if n == EMBEDDING else SINGLE for n in original})
    assert check_equal(tmp_path / "m", original).notes == []


def test_a_single_file_that_is_not_complete_names_the_index(tmp_path):
    original = load_file(make_member(tmp_path / "m", "dense-tied") / SINGLE)
    store(tmp_path / "m", {name: tensor for name, tensor in original.items() if name != EMBEDDING})
    store(tmp_path / "m", original, "model-00001-of-00001.safetensors")
    write_index(tmp_path / "m", dict.fromkeys(original, "model-00001-of-00001.safetensors"))
    message = refusal(tmp_path / "m")
    assert f"{EMBEDDING} is missing" in message
    assert f"{INDEX} is beside {SINGLE}" in message


def test_an_index_of_other_shards_names_both(tmp_path):
    original = load_file(make_member(tmp_path / "m", "dense-tied") / SINGLE)
    (tmp_path / "m" / SINGLE).rename(tmp_path / "m" / "model-00001-of-00001.safetensors")
    assert "(its other .safetensors files need the index; download it)" in refusal(tmp_path / "m")
    write_index(tmp_path / "m", dict.fromkeys(original, "model-00001-of-00003.safetensors"))
    message = refusal(tmp_path / "m")
    assert "lists model-00001-of-00003.safetensors, which is missing" in message
    assert "does not list model-00001-of-00001.safetensors, which is in the folder" in message


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_weights_have_the_permissions_of_other_files(mask, tmp_path):
    before = os.umask(mask)
    try:
        write_tensors(tmp_path / "model.safetensors", {"a": torch.ones(3)})
    finally:
        os.umask(before)
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o644 & ~mask


KEYS = {"both": ("dtype", "torch_dtype"), "transformers 4": ("torch_dtype",), "transformers 5": ("dtype",)}


@pytest.mark.parametrize("keys", KEYS.values(), ids=KEYS)
def test_each_key_of_the_type_is_written_and_rotary_positions_are_kept(keys, tmp_path):
    folder = make_member(tmp_path / "m", "dense-tied")
    config = json.loads((folder / "config.json").read_text())
    config = {name: value for name, value in config.items() if name not in ("dtype", "torch_dtype", "rope_parameters")}
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 16}
    config |= dict.fromkeys(keys, "bfloat16") | {"rope_theta": 1e6, "rope_scaling": yarn}
    (folder / "config.json").write_text(json.dumps(config))
    convert(ToMegatron(source=folder), tmp_path / "megatron", processes=1, overwrite=False)
    command = ["convert", "to-hf", str(tmp_path / "megatron"), str(tmp_path / "back"), "--base", str(folder)]
    assert main([*command, "--dtype", "float32", "--quiet"]) == 0
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == config | dict.fromkeys(keys, "float32")


def test_a_folder_without_weights(tmp_path):
    (make_member(tmp_path, "dense-tied") / SINGLE).unlink()
    with pytest.raises(UserError, match=rf"has neither {SINGLE} nor {INDEX}; download the weights too$"):
        HuggingFaceReader(tmp_path, read_shape(tmp_path))
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(UserError, match=rf"nor {INDEX} \(convert the .bin files to safetensors first\)$"):
        HuggingFaceReader(tmp_path, read_shape(tmp_path))
