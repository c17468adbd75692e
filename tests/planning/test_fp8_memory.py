"""The copies of weights that FP8 keeps, by hand, and plans with FP8 for GPUs of another machine."""

import pytest
import torch

from megatron_paint.base.errors import UserError
from megatron_paint.config.load import load_settings
from megatron_paint.planning.memory import make_plan
from megatron_paint.planning.search.sizes import find_model, folder_of
from megatron_paint.planning.stage_memory import StageMemory
from tests.planning.test_memory import ROOT, plan_of

PART = "FP8 copies of weights"
FP8 = ("megatron.fp8=hybrid", "model.dtype=bfloat16")
LAYER = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 12288  # matrices of a layer of Qwen3-8B


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """The plans are for GPUs elsewhere."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def copies(plan, *, stage: int = 0) -> float:
    """The part of every peak of a stage."""
    memory = StageMemory(plan.settings, plan, stage=stage, engine=plan.uses_engine, triton=True, on_gpus=True)
    peaks = [*memory.training(), *memory.sampling(), memory.resting()]
    (size,) = {peak.parts[PART] for peak in peaks}
    return size


@pytest.mark.parametrize("lora", ["{rank: 64, alpha: 128}", "null"])
def test_two_bytes_for_each_weight_of_a_product(lora, tmp_path):
    """8B at TP 2: half of the 36 layers' matrices, without embedding and output layer."""
    plan = plan_of(tmp_path, *FP8, f"model.lora={lora}", gpu_memory=80e9)
    assert copies(plan) == 2 * 36 * LAYER / 2


def test_layers_in_bfloat16_have_no_copies(tmp_path):
    """Of three stages of 12 layers, two layers of the first one and three of the last one are left out."""
    changes = (*FP8, "megatron.pipeline_model_parallel_size=3", "megatron.first_last_layers_bf16=true")
    changes += ("megatron.num_layers_at_start_in_bf16=2", "megatron.num_layers_at_end_in_bf16=3")
    plan = plan_of(tmp_path, *changes, processes=6, gpu_memory=80e9)
    assert [copies(plan, stage=stage) for stage in range(3)] == [2 * n * LAYER / 2 for n in (10, 12, 9)]


@pytest.mark.parametrize("change", ["megatron.fp8=null", "megatron.fp8_emulate=true"])
def test_other_layers_have_no_copies(change, tmp_path):
    assert copies(plan_of(tmp_path, *FP8, change, gpu_memory=80e9)) == 0


def test_experts_have_copies_and_routers_have_none():
    """30B-A3B at EP 8: 16 of 128 experts of a layer on a rank, and its attention."""
    folder = folder_of(find_model("qwen3_30b_a3b")[1])
    changes = [f"model.hf_path={folder}", *FP8, "megatron.tensor_model_parallel_size=1"]
    changes += ["megatron.sequence_parallel=false", "megatron.expert_model_parallel_size=8"]
    plan = make_plan(load_settings(ROOT / "examples/qwen3_30b_a3b/paint.yaml", changes), processes=8, gpu_memory=80e9)
    attention = 2 * 2048 * 4096 + 2 * 2048 * 512
    assert copies(plan) == 2 * 48 * (attention + 16 * 3 * 2048 * 768)


def test_a_plan_for_gpus_elsewhere_needs_none_here(tmp_path):
    changes = (*FP8, "megatron.transformer_impl=transformer_engine", "objective.kernel=triton")
    changes += ("megatron.deterministic_mode=true",)
    plan = plan_of(tmp_path, *changes, gpu_memory=80e9)
    lines = plan.lines(plan.settings)
    assert "layers     Transformer Engine, bfloat16, FP8 hybrid blockwise" in lines
    assert any(line.startswith("loss       elementwise work by triton, ") for line in lines)
    assert f"{PART} 6.95 GB" in plan.memory_lines()[0]
    with pytest.raises(UserError, match="transformer_engine: no CUDA device was found"):
        plan_of(tmp_path, *changes)
