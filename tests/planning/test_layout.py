"""The layout of the ranks: a suggested parallel size is valid for everything that is split."""

import json

import pytest

from megatron_paint.base.errors import UserError
from megatron_paint.config.megatron import MegatronSettings
from megatron_paint.config.settings import LoraSettings, ModelSettings, RolloutSettings
from megatron_paint.planning.layout import check_model, data_parallel_size

SIZES = {
    "model_type": "qwen3",
    "vocab_size": 960,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}


def check(folder, *, tp: int = 1, pp: int = 1, megatron: dict | None = None, lora: bool = False, **changes: int):
    (folder / "config.json").write_text(json.dumps(SIZES | changes))
    settings = MegatronSettings(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, **(megatron or {}))
    model = ModelSettings(hf_path=str(folder), lora=LoraSettings() if lora else None)
    return check_model(model, settings, RolloutSettings())


@pytest.mark.parametrize(
    ("tp", "changes", "nearest"),
    [
        (8, {}, 2),  # 4 heads and 2 groups: 4 would divide the heads alone
        (4, {}, 2),
        (3, {}, 2),
        (6, {"num_attention_heads": 12, "num_key_value_heads": 12}, 4),  # 64 of the feed-forward layer
        (16, {"num_attention_heads": 40, "num_key_value_heads": 8}, 8),
        (5, {"num_attention_heads": 3, "num_key_value_heads": 3}, 1),
    ],
)
def test_the_suggested_tensor_parallel_size_holds(tp, changes, nearest, tmp_path):
    with pytest.raises(UserError, match=rf"=\d+ does not divide .*; the nearest that fits the model is {nearest}$"):
        check(tmp_path, tp=tp, **changes)
    assert check(tmp_path, tp=nearest, **changes).num_layers == 6


def test_the_suggested_pipeline_parallel_size_holds(tmp_path):
    with pytest.raises(UserError, match=r"size=4 does not divide the number of layers, 6, .* fits the model is 3$"):
        check(tmp_path, pp=4)
    check(tmp_path, pp=3)


@pytest.mark.parametrize(
    ("processes", "sizes", "nearest"),
    [(6, (1, 2, 2), 8), (7, (2, 1, 1), 8), (3, (2, 2, 2), 8), (9, (2, 1, 2), 8)],
)
def test_the_suggested_number_of_processes_holds(processes, sizes, nearest):
    tp, pp, cp = sizes
    megatron = MegatronSettings(
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, context_parallel_size=cp
    )
    with pytest.raises(UserError, match=rf"must be a multiple of {tp * pp * cp} \(nearest: --processes {nearest}\)$"):
        data_parallel_size(processes, megatron)
    assert data_parallel_size(nearest, megatron) == nearest // (tp * pp * cp)


@pytest.mark.parametrize(
    ("unit", "pp", "more", "what", "nearest"),
    [
        (4, 1, {}, "pipeline stages of .* have 6 layers", 3),
        (2, 2, {"num_layers_in_first_pipeline_stage": 4}, None, 2),
        (3, 2, {"num_layers_in_first_pipeline_stage": 4}, "pipeline stages of .* have 2 and 4 layers", 2),
        (2, 2, {"pipeline_model_parallel_layout": "Et|t|tt|ttL"}, "chunks of layers of .* have 1 and 2 layers", 1),
    ],
)
def test_a_unit_of_recomputation_divides_every_chunk(unit, pp, more, what, nearest, tmp_path):
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": unit}
    if what is not None:
        with pytest.raises(
            UserError, match=rf"recompute_num_layers={unit} .* {what}; the nearest that fits is {nearest}$"
        ):
            check(tmp_path, pp=pp, megatron=full | more)
    check(tmp_path, pp=pp, megatron=full | more | {"recompute_num_layers": nearest})


def test_adapters_need_a_layer_on_every_stage(tmp_path):
    """All weights can be trained there: the embedding and the output layer."""
    ends = {"pipeline_model_parallel_layout": "E|ttt|ttt|L"}
    with pytest.raises(UserError, match="give pipeline stage 0 of 4 no layer"):
        check(tmp_path, pp=4, megatron=ends, lora=True)
    check(tmp_path, pp=4, megatron=ends)
    check(tmp_path, pp=2, megatron=ends, lora=True)


@pytest.mark.parametrize("end", ["start", "end"])
def test_layers_in_bfloat16_are_at_most_those_of_a_stage(end, tmp_path):
    """6 layers on 2 stages: Megatron accepts 3 at each end of the model."""
    given = {"fp8": "hybrid", "first_last_layers_bf16": True}
    with pytest.raises(UserError, match=rf"num_layers_at_{end}_in_bf16=4 .* stage: 3 of the 6 .* that fits is 3$"):
        check(tmp_path, pp=2, megatron={**given, f"num_layers_at_{end}_in_bf16": 4})
    for fitting in ({"num_layers_at_start_in_bf16": 3}, {f"num_layers_at_{end}_in_bf16": 4, "fp8": None}):
        assert check(tmp_path, pp=2, megatron=given | fitting).num_layers == 6
    assert check(tmp_path, megatron={**given, f"num_layers_at_{end}_in_bf16": 6}).num_layers == 6


@pytest.mark.parametrize(
    ("processes", "megatron", "told"),
    [
        (1, {"num_distributed_optimizer_instances": 2}, "the 1 copy of the weights that 1 process has: set it to 1"),
        (6, {"num_distributed_optimizer_instances": 4}, "=4 does not divide the 6 copies of the weights that 6 proc"),
        (
            8,
            {
                "tensor_model_parallel_size": 2,
                "pipeline_model_parallel_size": 2,
                "num_distributed_optimizer_instances": 4,
            },
            "=4 does not divide the 2 copies of the weights that 8 processes have: set it to a divisor of this number",
        ),
        (
            8,
            {"expert_model_parallel_size": 4, "num_distributed_optimizer_instances": 4},
            "=4 does not divide the 2 copies of each expert that 8 processes have",
        ),
    ],
)
def test_instances_of_the_optimiser_divide_the_copies(processes, megatron, told):
    with pytest.raises(UserError, match=told):
        data_parallel_size(processes, MegatronSettings(**megatron))


def test_copies_of_context_parallel_ranks_count():
    megatron = MegatronSettings(context_parallel_size=2, num_distributed_optimizer_instances=4)
    assert data_parallel_size(8, megatron) == 4
