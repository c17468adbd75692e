"""The optimiser's state, offloading and CUDA graphs: what is accepted, and each refusal with its fix."""

import pytest

from megatron_paint.base.errors import UserError
from megatron_paint.config.allow_changes import check_allow_changes
from megatron_paint.config.load import settings_of
from megatron_paint.config.not_supported import NOT_SUPPORTED
from megatron_paint.config.saved import forbidden_changes
from megatron_paint.config.tree import settings_tree

SMALLEST = {"model": {"hf_path": "m"}, "data": {"train": "p.jsonl"}, "run": {"dir": "r"}}
AWARE = {"use_precision_aware_optimizer": True}
HOST = AWARE | {"optimizer_cpu_offload": True}
LAYERS = {"cpu_offloading": True, "cpu_offloading_num_layers": 4}
NEEDS = "megatron.use_precision_aware_optimizer=true needs "


def settings(megatron, **sections):
    return settings_of(SMALLEST | {"megatron": megatron} | sections)


@pytest.mark.parametrize(
    "given",
    [
        AWARE,
        AWARE | {"exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"},
        AWARE | {"exp_avg_dtype": "bf16"},
        HOST,
        HOST | {"overlap_cpu_optimizer_d2h_h2d": True, "pin_cpu_grads": False},
        LAYERS,
        LAYERS | HOST | {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    ],
)
def test_accepted(given):
    found = settings(given).megatron
    assert {name: getattr(found, name) for name in given} == given


@pytest.mark.parametrize(
    ("given", "sections", "told"),
    [
        ({"exp_avg_dtype": "bf16"}, {}, "megatron.exp_avg_dtype=bf16 belongs to "
            "megatron.use_precision_aware_optimizer=true: set that, or leave exp_avg_dtype out"),
        ({"main_grads_dtype": "bf16"}, {}, "megatron.main_grads_dtype=bf16 belongs to "
            "megatron.use_precision_aware_optimizer=true: set that, or leave main_grads_dtype out"),
        (AWARE | {"use_distributed_optimizer": False}, {}, NEEDS + "megatron.use_distributed_optimizer=true: set one "
            "of the two"),
        (AWARE | {"use_distributed_optimizer": False}, {"optimizer": {"name": "sgd"}}, NEEDS + "optimizer.name=adam, "
            "and it is sgd: set one of the two"),
        (AWARE, {"model": {"hf_path": "m", "dtype": "float32"}}, NEEDS + "model.dtype=bfloat16, and it is float32: "
            "with float32 weights it would store them twice. Set it to false"),
        (AWARE | {"main_grads_dtype": "bf16"}, {}, "megatron.main_grads_dtype=bf16 is not supported: a step adds up "
            "the gradients of all its tokens and divides once, and such a sum loses too many digits in bfloat16. "
            "Leave it out"),
        (AWARE | {"main_params_dtype": "fp16"}, {}, "megatron.main_params_dtype=fp16 is not supported: Transformer "
            "Engine scales this type by one factor for each shard of a weight, so a checkpoint would be rounded again "
            "when another layout loads it. Set megatron.main_params_dtype to fp32"),
        (AWARE | {"exp_avg_dtype": "fp8"}, {}, "Set megatron.exp_avg_dtype to fp32 or bf16"),
        (AWARE | {"exp_avg_sq_dtype": "fp16"}, {}, "Set megatron.exp_avg_sq_dtype to fp32 or bf16"),
        ({"optimizer_cpu_offload": True}, {}, "megatron.optimizer_cpu_offload=true needs "
            "megatron.use_precision_aware_optimizer=true: without it the main weights stay on the GPU, and Megatron "
            "cannot load a checkpoint. Set both"),
        (HOST | {"exp_avg_sq_dtype": "bf16"}, {}, "megatron.exp_avg_sq_dtype=bf16 has no effect with "
            "megatron.optimizer_cpu_offload=true, whose moments are float32: leave exp_avg_sq_dtype out"),
        (HOST | {"optimizer_offload_fraction": 0.5}, {}, "megatron.optimizer_offload_fraction=0.5 is not supported: "
            "after a resume, Megatron would count the steps of the weights on the GPU wrongly. Set it to 1"),
        ({"optimizer_offload_fraction": 0.5}, {}, "megatron.optimizer_offload_fraction=0.5 belongs to "
            "megatron.optimizer_cpu_offload=true: set that, or leave optimizer_offload_fraction out"),
        ({"pin_cpu_grads": False}, {}, "megatron.pin_cpu_grads=false belongs to megatron.optimizer_cpu_offload=true"),
        ({"cpu_offloading_num_layers": 2}, {}, "megatron.cpu_offloading_num_layers=2 belongs to "
            "megatron.cpu_offloading=true: set that, or leave cpu_offloading_num_layers out"),
        ({"cpu_offloading": True}, {}, "megatron.cpu_offloading=true moves the activations of "
            "megatron.cpu_offloading_num_layers layers, and that is 0: set it"),
        (LAYERS | {"pipeline_model_parallel_size": 2}, {}, "megatron.cpu_offloading=true works on one pipeline stage "
            "only, in Megatron-Core, and megatron.pipeline_model_parallel_size=2: set one of the two"),
        (LAYERS | {"recompute_granularity": "selective"}, {}, "megatron.cpu_offloading=true keeps activations that "
            "megatron.recompute_granularity=selective computes again: leave one of them out"),
        (LAYERS | {"transformer_impl": "local"}, {}, "megatron.cpu_offloading=true needs the layers of Transformer "
            "Engine, and megatron.transformer_impl=local: leave one of them out"),
        ({"fp8": "hybrid", "fp8_emulate": True} | LAYERS, {}, "megatron.fp8_emulate=true: leave one of them out"),
    ],
)  # fmt: skip
def test_a_contradiction_is_refused(given, sections, told):
    with pytest.raises(UserError) as error:
        settings(given, **sections)
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("megatron", "rollout", "told"),
    [
        ({}, {"engine": "vllm", "vllm": {"urls": ["http://a"]}}, "rollout.engine=vllm captures its own graphs; leave "
            "cuda_graphs out"),
        ({"pipeline_model_parallel_size": 2}, {}, "with megatron.pipeline_model_parallel_size=2 a step waits for "
            "other stages: set one of the two"),
        ({"tensor_model_parallel_size": 2, "sequence_parallel": True}, {}, "cannot capture a step with "
            "megatron.sequence_parallel=true: Megatron changes CUDA's random state in it. Set one of the two to false"),
        ({"fp8": "hybrid"}, {}, "cannot capture a step with megatron.fp8=hybrid, whose scales change from call to "
            "call: leave one of them out"),
        (LAYERS, {}, "rollout.cuda_graphs=true and megatron.cpu_offloading=true exclude each other in Megatron-Core"),
    ],
)  # fmt: skip
def test_cuda_graphs_are_refused_where_nothing_can_be_captured(megatron, rollout, told):
    settings({"tensor_model_parallel_size": 2}, rollout={"cuda_graphs": True})
    with pytest.raises(UserError) as error:
        settings(megatron, rollout={"cuda_graphs": True} | rollout)
    assert told in str(error.value)


@pytest.mark.parametrize("key", NOT_SUPPORTED)
def test_a_setting_of_megatron_that_does_not_exist_here_says_why(key):
    with pytest.raises(UserError) as error:
        settings({key.removeprefix("megatron."): True})
    assert str(error.value) == f"{key} {NOT_SUPPORTED[key]}"
    with pytest.raises(UserError, match=NOT_SUPPORTED[key][:30]):
        check_allow_changes([key])


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("moe_token_dispatcher_type", "megatron.moe_token_dispatcher_type is always alltoall: "),
        ("moe_expert_capacity_factor", "megatron.moe_expert_capacity_factor is not supported: it drops tokens"),
        ("overlap_p2p_comm", "megatron.overlap_p2p_comm is chosen by the program: "),
        ("use_megatron_fsdp", "megatron.use_megatron_fsdp belongs to Megatron-FSDP, which is not supported: "),
    ],
)
def test_settings_of_other_programs_on_megatron_say_why(key, told):
    """Without a reason the error would suggest a setting that only has a similar name."""
    with pytest.raises(UserError) as error:
        settings({key: "alltoall"})
    assert str(error.value).startswith(told)


def test_what_a_resumed_run_may_change():
    """Where tensors are may change. What an optimiser rounds to may not, also for a run without these settings."""
    old = settings_tree(settings(HOST))
    new = settings_tree(settings(HOST | LAYERS | {"pin_cpu_grads": False}))
    assert forbidden_changes(old=old, new=new) == []
    graphs = settings_tree(settings({}, rollout={"cuda_graphs": True}))
    before = settings_tree(settings({}))
    for name in ("use_precision_aware_optimizer", "exp_avg_dtype", "cpu_offloading", "optimizer_cpu_offload"):
        del before["megatron"][name]
    del before["rollout"]["cuda_graphs"]
    assert forbidden_changes(old=before, new=graphs) == []
    moments = settings_tree(settings(AWARE | {"exp_avg_dtype": "bf16"}))
    assert forbidden_changes(old=before, new=moments) == [
        "megatron.use_precision_aware_optimizer: False -> True",
        "megatron.exp_avg_dtype: 'fp32' -> 'bf16'",
    ]
    with pytest.raises(UserError, match="its checkpoints hold it"):
        check_allow_changes(["megatron.optimizer_cpu_offload"])
