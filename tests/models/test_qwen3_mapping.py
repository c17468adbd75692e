"""The mapping with both kinds of Megatron's parameter names, at every layout, without Megatron.

Each rank's parameters are read from a Hugging Face folder and joined again. Every tensor appears once and is the same
to the bit.
"""

from itertools import product

import pytest
import torch
from safetensors.torch import load_file

from megatron_paint.checkpoints.hf_reader import HuggingFaceReader
from megatron_paint.models.qwen3.mapping import rule_of
from megatron_paint.models.qwen3.shape import read_shape
from megatron_paint.models.shape import ModelShape
from tests.convert.family import MEMBERS, make_member

NORMS = {
    "local": ("input_layernorm.weight", "pre_mlp_layernorm.weight"),
    "engine": ("self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight"),
}
EXPERTS = {
    "local": "mlp.experts.local_experts.{expert}.linear_fc{number}.weight",
    "engine": "mlp.experts.linear_fc{number}.weight{expert}",
}


def parameter_names(shape: ModelShape, naming: str, *, layers: int, experts: int, first: bool, last: bool) -> list[str]:
    """Returns the names of Megatron's local layers, or of Transformer Engine's with fused norms and grouped experts."""
    attention_norm, mlp_norm = NORMS[naming]
    inside = [f"self_attention.{part}.weight" for part in ("linear_qkv", "q_layernorm", "k_layernorm", "linear_proj")]
    if shape.num_experts:
        inside += [attention_norm, "pre_mlp_layernorm.weight", "mlp.router.weight"]
        inside += [EXPERTS[naming].format(expert=e, number=n) for e in range(experts) for n in (1, 2)]
    else:
        inside += [attention_norm, mlp_norm, "mlp.linear_fc1.weight", "mlp.linear_fc2.weight"]
    names = ["embedding.word_embeddings.weight"] * first
    names += [f"decoder.layers.{layer}.{name}" for layer in range(layers) for name in inside]
    return names + ["decoder.final_layernorm.weight", "output_layer.weight"] * last


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    folder = tmp_path_factory.mktemp("family")
    for member in MEMBERS:
        make_member(folder / member, member)
    return folder


@pytest.mark.parametrize(
    ("member", "naming", "tp", "pp", "vpp", "ep"),
    [
        case
        for case in product(MEMBERS, NORMS, (1, 2, 4), (1, 2), (1, 2), (1, 2, 4))
        if (case[4] == 1 or case[3] > 1) and (case[5] == 1 or case[0] == "moe")
    ],
)
def test_there_and_back(member, naming, tp, pp, vpp, ep, family):
    shape = read_shape(family / member)
    reader = HuggingFaceReader(family / member, shape)
    source = load_file(family / member / "model.safetensors")
    chunks, experts = pp * vpp, shape.num_experts // ep
    layers = shape.num_layers // chunks
    back: dict[str, torch.Tensor] = {}
    for chunk, ep_rank in product(range(chunks), range(ep)):  # of a model cut into chunks, in the order of the network
        ends = {"first": chunk == 0, "last": chunk == chunks - 1}
        for name in parameter_names(shape, naming, layers=layers, experts=experts, **ends):
            place = {"first_layer": chunk * layers, "first_expert": ep_rank * experts}
            rule = rule_of(name, shape, **place)
            shards = [rule.load(reader, rank=rank, ranks=tp) for rank in range(tp)]
            for hf_name, tensor in rule.unload(shards).items():
                copied = (".experts." not in name and ep_rank > 0) or (name == "output_layer.weight" and shape.tied)
                assert (hf_name in back) == copied, (name, hf_name)
                back[hf_name] = tensor
                assert torch.equal(tensor, source[hf_name]), hf_name
    assert back.keys() == source.keys()


def test_an_unknown_parameter_is_refused(family):
    with pytest.raises(KeyError, match=r"decoder\.layers\.0\.self_attention\.linear_qkv\.bias"):
        rule_of("decoder.layers.0.self_attention.linear_qkv.bias", read_shape(family / "dense-tied"), first_layer=0)
