"""What the types of the optimiser's state and offloading change in the estimate, by hand arithmetic, and on CPUs."""

import dataclasses

import pytest

from megatron_paint.base.errors import UserError
from megatron_paint.planning.estimate import estimate
from megatron_paint.planning.stage_memory import StageMemory
from tests.planning.test_memory import plan_of

ALL_WEIGHTS = ("model.lora=null", "megatron.recompute_granularity=null", "megatron.recompute_method=null")
ALL_WEIGHTS += ("megatron.recompute_num_layers=null",)
WEIGHTS = 4_095_521_792  # of Qwen3-8B at TP 2, docs/memory.md
GPU = ("--gpu-memory 80GB", 80e9)
AWARE = "megatron.use_precision_aware_optimizer=true"
HOST = "megatron.optimizer_cpu_offload=true"


def planned(tmp_path, *changes):
    return plan_of(tmp_path, *ALL_WEIGHTS, *changes, gpu_memory=GPU[1])


@pytest.mark.parametrize(
    ("changes", "bytes_a_weight"),
    [
        ([], 4 + 4 + 4),
        ([AWARE], 4 + 4 + 4),
        ([AWARE, "megatron.exp_avg_dtype=bf16"], 4 + 2 + 4),
        ([AWARE, "megatron.exp_avg_dtype=bf16", "megatron.exp_avg_sq_dtype=bf16"], 4 + 2 + 2),
        ([AWARE, HOST], 0),
    ],
)
def test_bytes_of_the_optimiser_on_the_gpu(changes, bytes_a_weight, tmp_path):
    """Four replicas share the state of a rank's weights."""
    training = planned(tmp_path, *changes).memory.training
    assert training.parts["optimiser"] == WEIGHTS * bytes_a_weight / 4


def test_an_optimiser_on_the_host_takes_16_bytes_a_weight_there(tmp_path):
    """Main weight, two moments, a copy of the gradient. The part of a checkpoint does not change."""
    gpu, host = planned(tmp_path).memory.host, planned(tmp_path, AWARE, HOST).memory.host
    assert host.rank - gpu.rank == pytest.approx(16 * WEIGHTS / 4)
    assert host.node - gpu.node == pytest.approx(8 * 16 * WEIGHTS / 4)


def test_lora_has_few_weights_to_offload(tmp_path):
    """120,324,096 weights of adapters on a rank, docs/memory.md."""
    plain, moved = (plan_of(tmp_path, *changes, gpu_memory=8e10).memory for changes in ([], [AWARE, HOST]))
    assert plain.training.parts["optimiser"] - moved.training.parts["optimiser"] == 12 * 120_324_096 / 4
    assert moved.host.rank - plain.host.rank == pytest.approx(16 * 120_324_096 / 4)


@pytest.mark.parametrize("layers", [1, 20, 35])
def test_activations_of_offloaded_layers_are_on_the_host(layers, tmp_path):
    """All 36 layers save as much."""
    changes = [f"megatron.cpu_offloading_num_layers={layers}", "megatron.cpu_offloading=true"]
    plain, moved = planned(tmp_path), planned(tmp_path, *changes)
    sides = [
        StageMemory(plan.settings, plan, stage=0, engine=True, triton=True, on_gpus=True) for plan in (plain, moved)
    ]
    kept = [side.training()[0].parts["activations"] for side in sides]
    assert kept[1] == pytest.approx(kept[0] * (36 - layers) / 36)
    assert moved.memory.host.rank - plain.memory.host.rank == pytest.approx(kept[0] * layers / 36)


def test_a_contradiction_that_the_search_meets_has_an_estimate(tmp_path):
    """The search estimates a candidate before it checks contradictions: here a stage has fewer layers."""
    plan = planned(tmp_path)
    changes = {"cpu_offloading": True, "cpu_offloading_num_layers": 40}
    settings = dataclasses.replace(plan.settings, megatron=dataclasses.replace(plan.settings.megatron, **changes))
    found = estimate(settings, plan, engine=True, triton=True, on_gpus=True, ranks_per_node=8)
    assert found.training.parts.get("activations", 0) >= 0


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ([AWARE], "megatron.use_precision_aware_optimizer=true needs the Adam of Transformer Engine on a GPU: no CUDA "
            "device was found; set it to false"),
        (["megatron.cpu_offloading=true", "megatron.cpu_offloading_num_layers=2"], "megatron.cpu_offloading=true "
            "needs the layers of Transformer Engine on a GPU: no CUDA device was found; set it to false"),
        (["rollout.cuda_graphs=true", "megatron.sequence_parallel=false"], "rollout.cuda_graphs=true captures CUDA "
            "graphs, and no CUDA device was found; set it to false"),
    ],
)  # fmt: skip
def test_a_machine_without_a_gpu_refuses(changes, told, tmp_path):
    """But it plans such a run for GPUs elsewhere."""
    assert plan_of(tmp_path, *ALL_WEIGHTS, *changes, gpu_memory=8e10).memory.training.total > 0
    with pytest.raises(UserError) as error:
        plan_of(tmp_path, *ALL_WEIGHTS, *changes)
    assert str(error.value) == told


def test_some_layers_must_stay(tmp_path):
    with pytest.raises(UserError) as error:
        planned(tmp_path, "megatron.cpu_offloading=true", "megatron.cpu_offloading_num_layers=36")
    assert "megatron.cpu_offloading_num_layers=36 must be less than the 36 layers of" in str(error.value)
    assert str(error.value).endswith("the nearest that fits is 35")


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        (
            ("megatron.cpu_offloading=true", "megatron.cpu_offloading_num_layers=1"),
            "megatron.recompute_granularity=full",
        ),
        (("rollout.cuda_graphs=true",), "megatron.sequence_parallel=true"),
    ],
)
def test_advice_is_only_what_the_settings_allow(changes, refused, tmp_path):
    """Both changes would lower the peak: without the setting that excludes them, they are proposed."""
    (allowed,) = planned(tmp_path, "megatron.sequence_parallel=false").warnings()
    assert f"{refused} " in allowed
    (warning,) = planned(tmp_path, "megatron.sequence_parallel=false", *changes).warnings()
    assert refused not in warning
    assert "16 ranks (to " in warning
