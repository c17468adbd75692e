"""Layouts of a mixture of experts: what is refused and with which advice, and how many weights a rank has."""

import json
import re
from pathlib import Path

import pytest

from megatron_paint.base.errors import UserError
from megatron_paint.config.load import load_settings
from megatron_paint.config.megatron import MegatronSettings
from megatron_paint.config.settings import LoraSettings, ModelSettings, RolloutSettings
from megatron_paint.models.qwen3.shape import read_shape
from megatron_paint.planning.layout import check_auxiliary_losses, check_layout, data_parallel_size, fewest_processes
from megatron_paint.planning.memory import make_plan
from megatron_paint.planning.stage_memory import StageMemory
from megatron_paint.planning.weights import adapter_parameters, rank_weights

SIZES = {  # Qwen3-30B-A3B
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SIZES))
    return tmp_path


def check(folder, *, processes: int = 8, lora: LoraSettings | None = None, **megatron):
    settings = MegatronSettings(**megatron)
    return check_layout(ModelSettings(hf_path=str(folder), lora=lora), settings, RolloutSettings(), processes=processes)


SP = {"sequence_parallel": True}
REFUSED = {
    "experts that no rank count divides": (
        {"expert_model_parallel_size": 6},
        "megatron.expert_model_parallel_size=6 does not divide the number of experts, 128",
        "the nearest that fits the model is 4",
    ),
    "experts cut where they do not divide": (
        {"expert_tensor_parallel_size": 5},
        "megatron.expert_tensor_parallel_size=5 does not divide the feed-forward size of an expert, 768",
        "the nearest that fits the model is 4",
    ),
    "no sequence parallelism": (
        {"tensor_model_parallel_size": 2},
        "megatron.tensor_model_parallel_size=2 needs megatron.sequence_parallel=true with a mixture of experts",
        "every rank would route all tokens otherwise",
    ),
    "more experts' parts than ranks": (
        {"expert_model_parallel_size": 16, "expert_tensor_parallel_size": 1},
        "a pipeline stage of 8 processes cannot hold complete sets of experts",
        "expert_model_parallel_size=16 x expert_tensor_parallel_size=1: the number of processes must be a multiple of "
        "16 (nearest: --processes 16)",
    ),
    "experts cut over the tensor-parallel ranks by default": (
        {"expert_model_parallel_size": 8, "tensor_model_parallel_size": 2, **SP},
        "expert_model_parallel_size=8 x tensor_model_parallel_size=2 (expert_tensor_parallel_size is not set)",
        "(nearest: --processes 16)",
    ),
}


def test_every_stage_of_a_mixture_has_a_layer(folder):
    """Its experts have an optimiser of their own, which saves no count of steps without a weight."""
    layout = {"pipeline_model_parallel_size": 4, "pipeline_model_parallel_layout": "E|t*24|t*24|L"}
    with pytest.raises(UserError, match=r"is a mixture of experts, .* give pipeline stage 0 of 4 no layer: give it"):
        check(folder, **layout)


@pytest.mark.parametrize(
    ("megatron", "fewest"),
    [
        ({}, 1),
        ({"expert_model_parallel_size": 2}, 2),
        ({"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 3, "expert_model_parallel_size": 4}, 24),
        ({"context_parallel_size": 2, "expert_model_parallel_size": 3, "expert_tensor_parallel_size": 1}, 6),
    ],
)
def test_the_fewest_processes_hold_every_expert(megatron, fewest):
    settings = MegatronSettings(**megatron)
    assert fewest_processes(settings) == fewest
    assert data_parallel_size(fewest, settings) >= 1
    if fewest > 1:
        with pytest.raises(UserError):
            data_parallel_size(fewest // 2, settings)


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_setting_and_fix(case, folder):
    megatron, *parts = REFUSED[case]
    with pytest.raises(UserError) as caught:
        check(folder, **megatron)
    assert "\n" not in str(caught.value)
    assert all(part in str(caught.value) for part in parts), caught.value


@pytest.mark.parametrize(
    ("name", "megatron"),
    [
        ("expert_model_parallel_size=2", {"expert_model_parallel_size": 2}),
        ("expert_tensor_parallel_size=1", {"expert_tensor_parallel_size": 1}),
        ("moe_z_loss_coeff", {"moe_z_loss_coeff": 1e-3}),
    ],
)
def test_a_dense_model_has_no_experts(name, megatron, folder):
    (folder / "config.json").write_text(json.dumps(SIZES | {"model_type": "qwen3"}))
    with pytest.raises(UserError, match=rf"megatron\.{name} .* has none; leave {name.split('=')[0]} out"):
        check(folder, **megatron)
    with pytest.raises(UserError, match=r"model\.lora\.experts=true adapts experts, and .* has none"):
        check(folder, lora=LoraSettings(experts=True))


def test_adapters_on_experts_need_complete_experts(folder):
    megatron = {"tensor_model_parallel_size": 2, **SP}
    with pytest.raises(UserError, match=re.escape("set megatron.expert_tensor_parallel_size=1")):
        check(folder, lora=LoraSettings(experts=True), **megatron)
    check(folder, lora=LoraSettings(experts=True), expert_tensor_parallel_size=1, **megatron)
    check(folder, lora=LoraSettings(), **megatron)


def test_losses_of_routers_need_a_version_that_scales_them(folder):
    megatron = MegatronSettings(moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=1e-3)
    with pytest.raises(
        UserError, match=r"megatron\.moe_aux_loss_coeff needs megatron-core 0\.19 or newer, and 0\.16\.1"
    ):
        check_auxiliary_losses(megatron, version="0.16.1")
    check_auxiliary_losses(megatron, version="0.19.2")
    check_auxiliary_losses(MegatronSettings(), version="0.16.1")


@pytest.mark.parametrize(
    ("processes", "megatron", "copies"),
    [
        (8, {"expert_model_parallel_size": 8}, 1),
        (16, {"expert_model_parallel_size": 8}, 2),
        (8, {"expert_model_parallel_size": 4, "tensor_model_parallel_size": 2, **SP}, 1),
        (
            8,
            {"expert_model_parallel_size": 4, "tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1, **SP},
            2,
        ),
        (8, {"expert_model_parallel_size": 2, "pipeline_model_parallel_size": 2}, 2),
    ],
)
def test_copies_of_an_expert(processes, megatron, copies, folder):
    assert check(folder, processes=processes, **megatron).expert_replicas == copies


def test_a_model_of_other_feed_forward_size_than_its_experts(folder):
    """The dense feed-forward size of the config is no size of a mixture: it need not divide."""
    (folder / "config.json").write_text(json.dumps(SIZES | {"intermediate_size": 6145}))
    check(folder, tensor_model_parallel_size=2, **SP)


def test_ranks_together_have_the_model(folder):
    """Qwen3-30B-A3B has 30,532,122,624 weights, by its model card 30.5B."""
    shape = read_shape(folder)
    assert shape.num_parameters == 30_532_122_624
    (alone,) = (rank_weights(shape, tp=1, pp=1, stage=0, layers=48, lora_rank=None),)
    assert alone.base == shape.num_parameters
    assert alone.experts == 48 * 128 * 3 * 2048 * 768
    for tp, ep, etp in ((1, 8, 1), (2, 4, 2), (4, 8, 1)):
        rank = rank_weights(shape, tp=tp, pp=1, stage=0, layers=48, lora_rank=None, ep=ep, etp=etp)
        replicated = 48 * (2 * 2048 + 2 * 128 + 128 * 2048) + 2048  # norms and routers
        dense = alone.base - alone.experts - replicated
        assert rank.experts == alone.experts // (ep * etp)
        assert rank.base == rank.experts + dense // tp + replicated
        assert rank.trained_experts == rank.experts


def test_adapters_of_a_mixture(folder):
    """Attention has four pairs; an expert has one for gate and up together and one for down."""
    shape = read_shape(folder)
    attention = 64 * ((2048 + 4096) + 2 * (2048 + 512) + (4096 + 2048))
    experts = 128 * 64 * ((2048 + 2 * 768) + (768 + 2048))
    assert adapter_parameters(shape, 64) == 48 * attention
    assert adapter_parameters(shape, 64, experts=True) == 48 * (attention + experts)
    rank = rank_weights(shape, tp=1, pp=2, stage=0, layers=24, lora_rank=64, ep=8, adapts_experts=True)
    assert rank.trained == rank.adapters == 24 * (attention + experts // 8)
    assert rank.trained_experts == 24 * experts // 8


@pytest.mark.parametrize(
    ("engine", "sizes", "weights"),
    [
        (True, {"ep": 8}, 16 * 2 * 768 * 2048),  # gate and up of 16 experts
        (True, {"ep": 4, "tp": 2, "etp": 2}, 32 * 2 * 768 // 2 * 2048),
        (True, {"ep": 128, "tp": 1}, (32 + 2 * 4) * 128 * 2048),  # query, key and value
        (False, {"ep": 8}, (32 + 2 * 4) * 128 * 2048),  # expert after expert
    ],
)
def test_the_gradient_of_one_product(engine, sizes, weights, folder):
    """Transformer Engine computes all experts of a rank together, so their gradient exists at one time."""
    tp, etp = sizes.get("tp", 1), sizes.get("etp", 1)
    megatron = {"tensor_model_parallel_size": tp, "expert_tensor_parallel_size": etp, "sequence_parallel": tp > 1}
    preset = Path(__file__).parents[2] / "examples" / "qwen3_30b_a3b" / "paint.yaml"
    changes = [f"megatron.{name}={json.dumps(value)}" for name, value in megatron.items()]
    changes += [f"model.hf_path={folder}", f"megatron.expert_model_parallel_size={sizes['ep']}"]
    settings = load_settings(preset, [*changes, "model.lora=null"])
    layout = check_layout(settings.model, settings.megatron, settings.rollout, processes=128)

    with_lora = load_settings(preset, [*changes, "model.lora={rank: 8, alpha: 16}"])
    memory = StageMemory(settings, layout, stage=0, engine=engine, triton=True, on_gpus=True)
    assert memory._weight_gradient() == 2 * weights
    assert StageMemory(with_lora, layout, stage=0, engine=engine, triton=True, on_gpus=True)._weight_gradient() == 0


def test_too_little_memory_gets_advice_that_fits(folder):
    """More parts of the experts come first; every advised size is one that the layout accepts."""
    preset = Path(__file__).parents[2] / "examples" / "qwen3_8b" / "paint.yaml"
    changes = [f"model.hf_path={folder}", "megatron.tensor_model_parallel_size=1", "megatron.sequence_parallel=false"]
    changes += ["model.lora=null", "megatron.expert_model_parallel_size=2"]
    plan = make_plan(load_settings(preset, changes), processes=8, gpu_memory=80e9)
    (warning,) = plan.warnings()
    advised = re.findall(r"(megatron\.\S+=\S+(?: megatron\.\S+=\S+)*) \(to", warning)
    assert advised[0] == "megatron.expert_model_parallel_size=4"
    for advice in advised:
        make_plan(load_settings(preset, [*changes, *advice.split()]), processes=8, gpu_memory=80e9)
