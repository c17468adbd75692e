"""Adapters of a mixture that PEFT has written for the stacked experts of `transformers` 5: read, merged, continued."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from megatron_paint.base.errors import UserError
from megatron_paint.checkpoints.adapter_reader import Adapter
from megatron_paint.checkpoints.hf_reader import HuggingFaceReader
from megatron_paint.checkpoints.stacked_adapters import packed, unpacked
from megatron_paint.config.settings import LoraSettings
from megatron_paint.models.qwen3.mapping import hugging_face_shapes
from megatron_paint.models.qwen3.shape import read_shape
from tests.mcore.plain_runs import by_expert

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 12,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CASES = {
    "attention and experts": {"target_modules": ATTENTION, "target_parameters": BOTH},
    "experts in the other order": {"target_modules": ATTENTION, "target_parameters": BOTH[::-1]},
    "only down": {"target_modules": ["q_proj"], "target_parameters": BOTH[1:]},
    "only gate and up": {"target_modules": ["q_proj"], "target_parameters": BOTH[:1]},
    "attention alone": {"target_modules": ATTENTION},
    "rank-stabilised": {"target_modules": ATTENTION, "target_parameters": BOTH, "use_rslora": True},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("base") / "model"
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, norm_topk_prob=True)).save_pretrained(folder)
    return folder


def make_adapter(base, folder, **config):
    """An adapter of PEFT whose every tensor is random."""
    torch.manual_seed(2)
    config = LoraConfig(**{"r": 3, "lora_alpha": 6} | config)
    model = get_peft_model(Qwen3MoeForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_merged_as_peft_merges(case, base, tmp_path):
    folder = make_adapter(base, tmp_path / "adapter", **CASES[case])
    model = PeftModel.from_pretrained(Qwen3MoeForCausalLM.from_pretrained(base), folder)
    merged, before = by_expert(model.merge_and_unload().state_dict()), HuggingFaceReader(base, read_shape(base))
    shape = read_shape(base)
    read = Adapter(folder, shape).merged(before)
    changed = set()
    for name, size in hugging_face_shapes(shape).items():
        torch.testing.assert_close(read(name), merged[name], rtol=1e-6, atol=1e-6, msg=f"{case}: {name}")
        if len(size) == 2:  # a slice, as a tensor-parallel rank reads it
            rows, columns = slice(1, size[0] // 2), slice(size[1] // 2, size[1])
            part = read(name, rows=rows, columns=columns)
            torch.testing.assert_close(part, merged[name][rows, columns], rtol=1e-6, atol=1e-6)
        if not torch.equal(before(name), merged[name]):
            changed.add(name.split(".")[-2])
    experts = CASES[case].get("target_parameters", ())
    wanted = set(CASES[case]["target_modules"])
    wanted |= {"gate_proj", "up_proj"} if BOTH[0] in experts else set()
    wanted |= {"down_proj"} if BOTH[1] in experts else set()
    assert changed == wanted


def test_packed_and_unpacked():
    """PEFT: A has the experts' rows one after another; in B experts are the faster index of the columns."""
    a_EKI, b_EOK = torch.arange(24.0).reshape(2, 3, 4), torch.arange(30.0).reshape(2, 5, 3)
    a, b = packed("A", a_EKI), packed("B", b_EOK)
    assert a[1 * 3 + 2, 1] == a_EKI[1, 2, 1]
    assert b[4, 2 * 2 + 1] == b_EOK[1, 4, 2]
    assert torch.equal(unpacked("A", a, 2), a_EKI)
    assert torch.equal(unpacked("B", b, 2), b_EOK)


@pytest.mark.parametrize(
    ("case", "lora", "says"),
    [
        ("attention and experts", {}, "set model.lora.experts=true"),
        ("attention and experts", {"rank": 4}, "set model.lora.rank=3"),
        ("rank-stabilised", {"experts": True}, "set model.lora.rank=3 model.lora.alpha=10.39"),
    ],
)
def test_what_a_run_cannot_continue_from(case, lora, says, base, tmp_path):
    adapter = Adapter(make_adapter(base, tmp_path / "adapter", **CASES[case]), read_shape(base))
    settings = LoraSettings(**{"rank": 3, "alpha": 6.0, "experts": "rank" in lora} | lora)
    with pytest.raises(UserError) as caught:
        adapter.check_continues(settings)
    assert says in str(caught.value)


def test_what_a_run_adds(base, tmp_path):
    adapter = Adapter(make_adapter(base, tmp_path / "adapter", **CASES["only down"]), read_shape(base))
    lora = LoraSettings(rank=3, alpha=6.0, experts=True)
    adapter.check_continues(lora)
    missing = adapter.missing(lora)
    assert "model.layers.1.mlp.experts.gate_up_proj" in missing
    assert "model.layers.0.self_attn.v_proj" in missing
    assert len(missing) == 2 * (3 + 1)


def test_another_parameter_is_refused(base, tmp_path):
    folder = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"], target_parameters=["mlp.gate.weight"])
    with pytest.raises(UserError, match=r"target_parameters has mlp\.gate\.weight"):
        Adapter(folder, read_shape(base))
