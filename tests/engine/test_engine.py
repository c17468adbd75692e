"""Stages of Transformer Engine's layers, built on a CPU: their weights, names, marks and checkpoints."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from tests.engine.cases import CASES, Case

ROOT = Path(__file__).parents[2]
ENGINE = os.environ.get("MEGATRON_PAINT_TE")
PARTS = ("transformer_engine", "nvdlfw_inspect")  # and their metadata; nothing else of the folder
SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not ENGINE, reason="MEGATRON_PAINT_TE names no folder with Transformer Engine"),
]


def make_models(folder: Path) -> None:
    torch.manual_seed(0)
    for name, tied in (("dense", False), ("tied", True)):
        Qwen3ForCausalLM(Qwen3Config(**SIZES, tie_word_embeddings=tied)).save_pretrained(folder / name)
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **EXPERTS)).save_pretrained(folder / "experts")


def environment(folder: Path) -> dict[str, str]:
    """Finds Transformer Engine, and the CUDA libraries that came with torch. It changes nothing for other tests."""
    folder.mkdir()
    for part in Path(ENGINE).iterdir():
        if part.name.startswith(PARTS):
            (folder / part.name).symlink_to(part.resolve())
    nvidia = Path(next(iter(find_spec("nvidia").submodule_search_locations)))
    libraries = [str(path) for path in sorted(nvidia.glob("*/lib"))]
    return os.environ | {
        "PYTHONPATH": f"{folder}:{ROOT}",
        "LD_LIBRARY_PATH": ":".join(libraries),
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> dict[str, list[dict]]:
    """What every rank of every case found."""
    folder = tmp_path_factory.mktemp("engine")
    models, out = folder / "models", folder / "out"
    out.mkdir()
    make_models(models)
    command = [sys.executable, "-W", "ignore", "-m", "tests.engine.worker", models, out]
    ended = subprocess.run(command, cwd=ROOT, env=environment(folder / "path"), capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-6000:]
    files = {case.name: [out / f"{case.name}-{rank}.json" for rank in range(case.processes)] for case in CASES}
    missing = [file.name for found in files.values() for file in found if not file.exists()]
    assert not missing, f"{missing}\n{ended.stderr[-6000:]}"
    return {name: [json.loads(file.read_text()) for file in found] for name, found in files.items()}


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request) -> Case:
    return request.param


def test_the_layers_are_transformer_engines(case, ranks):
    linear = "TEColumnParallelLinear" if case.lora else "TELayerNormColumnParallelLinear"
    for found in ranks[case.name]:
        assert found["layers"]["linear_qkv"] == linear
        assert found["layers"]["core_attention"] == "RowsTransformerEngineAttention"
        assert found["layers"]["mlp"] == ("TEGroupedMLP" if case.model == "experts" else linear)
        assert found["fp8"] == case.fp8_recipe


def test_every_weight_is_that_of_the_hugging_face_folder(case, ranks):
    for found in ranks[case.name]:
        assert found["not_filled"] == []
        assert found["differs"] == []


def test_checkpoints_have_the_entries_of_plain_layers(case, ranks):
    for found in ranks[case.name]:
        assert found["sharded"] == found["sharded_of_plain"]
        assert len(found["sharded"]) > 5


def test_marks_are_those_of_plain_layers(case, ranks):
    """Which weights are shards, which gradients are summed over tensor-parallel ranks, which over experts' replicas."""
    for found in ranks[case.name]:
        assert found["marks"] == found["marks_of_plain"]
        assert any(is_split for is_split, *_ in found["marks"].values())


def test_both_kinds_of_layers_load_each_others_checkpoints(case, ranks):
    if not case.crosses:
        assert all(found["loaded"] == {} for found in ranks[case.name])
        return
    for found in ranks[case.name]:
        assert found["loaded"] == {"plain from engine": [], "engine from plain": []}


def test_calls_of_sampling_wait_for_no_rank_of_a_row(case, ranks):
    assert [found["sampling_differs"] for found in ranks[case.name]] == [0.0] * case.processes


def test_gradients_have_buffers_and_the_optimiser_is_sharded(case, ranks):
    for found in ranks[case.name]:
        assert found["has_buffers"]
        assert set(found["optimizer"]) == {"DistributedOptimizer"}


def test_the_state_of_a_precision_aware_optimiser_comes_back(case, ranks):
    """Main weights in float32, moments in bfloat16. Its checkpoint has the entries of the usual optimiser's."""
    if not case.saves_state:
        assert all("saved" not in found for found in ranks[case.name])
        return
    types = {"exp_avg": "torch.bfloat16", "exp_avg_sq": "torch.bfloat16", "master_param": "torch.float32"}
    for found in ranks[case.name]:
        saved = found["saved"]
        assert saved["class"] == ["transformer_engine.pytorch.optimizers.fused_adam"]
        assert (saved["began at"], saved["steps"], saved["left"]) == ([0], [7], 0)
        assert (saved["changed"], saved["comes back"]) == (True, True)
        assert saved["types"] == types
        assert found["from usual"]


def test_offloaded_activations_are_transformer_engines(case, ranks):
    for found in ranks[case.name]:
        if case.pp > 1:
            assert "offloading" not in found
            continue
        assert found["offloading"] == {"cpu_offloading": True, "cpu_offloading_num_layers": 1}
        assert found["offload context"]["context"].startswith("transformer_engine.pytorch.cpu_offload")
        assert found["offload context"]["gradients"] == [True] * 8
