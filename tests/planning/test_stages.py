"""The layers of each stage: worked by hand, and what is refused with which advice."""

from dataclasses import replace

import pytest

from megatron_paint.base.errors import UserError
from megatron_paint.config.megatron import MegatronSettings
from megatron_paint.models.shape import ModelShape
from megatron_paint.planning.stages import chunks_a_stage, in_flight, split_layers

SHAPE = ModelShape(
    source="config.json",
    vocab_size=960,
    hidden_size=32,
    num_layers=8,
    num_heads=4,
    num_groups=2,
    head_dim=8,
    ffn_size=64,
    tied=True,
    qk_norm=True,
    qkv_bias=False,
    rope_theta=1e6,
    norm_eps=1e-6,
    max_positions=128,
    dtype="bfloat16",
)
NAMES = {
    "pp": "pipeline_model_parallel_size",
    "vp": "virtual_pipeline_model_parallel_size",
    "first": "num_layers_in_first_pipeline_stage",
    "last": "num_layers_in_last_pipeline_stage",
    "embedding": "account_for_embedding_in_pipeline_split",
    "loss": "account_for_loss_in_pipeline_split",
    "layout": "pipeline_model_parallel_layout",
}


def split(layers: int, **settings):
    megatron = MegatronSettings(**{NAMES[name]: value for name, value in settings.items()})
    found = split_layers(replace(SHAPE, num_layers=layers), megatron)
    assert found.chunks == chunks_a_stage(megatron)
    return found


@pytest.mark.parametrize(
    ("layers", "settings", "wanted", "text"),
    [
        (8, {}, [[8]], "8 layers a stage"),
        (8, {"pp": 2}, [[4], [4]], "4 layers a stage"),
        (8, {"pp": 2, "vp": 2}, [[2, 2], [2, 2]], "4 layers a stage in 2 chunks"),
        (8, {"pp": 2, "vp": 1}, [[4], [4]], "4 layers a stage"),
        (7, {"pp": 2, "first": 4}, [[4], [3]], "4, 3 layers on the stages"),
        (7, {"pp": 4, "first": 2, "last": 1}, [[2], [2], [2], [1]], "2, 2, 2, 1 layers on the stages"),
        (10, {"pp": 3, "last": 2, "vp": 2}, [[2, 2], [2, 2], [1, 1]], "2+2, 2+2, 1+1 layers on the stages in 2 chunks"),
        (7, {"pp": 2, "embedding": True}, [[3], [4]], "3, 4 layers on the stages"),
        (6, {"pp": 4, "embedding": True, "loss": True}, [[1], [2], [2], [1]], "1, 2, 2, 1 layers on the stages"),
        (6, {"pp": 2, "vp": 2, "embedding": True, "loss": True}, [[1, 2], [2, 1]], None),
        (2, {"pp": 4, "embedding": True, "loss": True}, [[0], [1], [1], [0]], None),
        (7, {"pp": 2, "layout": "Et*4|t*3L"}, [[4], [3]], None),
        (7, {"pp": 2, "layout": "Et|tt|ttt|tL"}, [[1, 3], [2, 1]], None),
        (7, {"pp": 4, "layout": "E|ttt|tttt|L"}, [[0], [3], [4], [0]], None),
        (8, {"pp": 2, "layout": "E,(t|)*4,t*4,L"}, None, None),
        (7, {"pp": 2, "layout": "E,(t|)*3,t*4,L"}, [[1, 1], [1, 4]], None),
        (4, {"pp": 2, "layout": "Ett|||ttL", "vp": 2}, [[2, 0], [0, 2]], None),
    ],
)
def test_layers_of_each_chunk(layers, settings, wanted, text):
    if wanted is None:
        with pytest.raises(UserError, match=r"has 5 chunks, and .*=2 stages need"):
            split(layers, **settings)
        return
    found = split(layers, **settings)
    assert [list(found.sizes(stage)) for stage in range(len(wanted))] == wanted
    assert text is None or str(found) == text
    assert found.most == max(map(sum, wanted))
    in_order = [layer for chunk in range(found.chunks) for stage in found.layers for layer in stage[chunk]]
    assert in_order == list(range(layers))


@pytest.mark.parametrize(
    ("layers", "settings", "told"),
    [
        (6, {"pp": 4}, "pipeline_model_parallel_size=4 does not divide the number of layers, 6, of config.json; the "
            "nearest that fits the model is 3"),
        (8, {"pp": 2, "vp": 3}, "virtual_pipeline_model_parallel_size=3 does not divide the number of layers of a "
            "stage, 4, of config.json; the nearest that fits the model is 2"),
        (7, {"pp": 3, "embedding": True}, "pipeline_model_parallel_size=3 does not divide the number of layers, 7, of "
            "config.json and 1 more for account_for_embedding_in_pipeline_split; the nearest that fits the model is 2"),
        (7, {"pp": 2, "first": 7}, "num_layers_in_first_pipeline_stage=7 leaves 0 of the 7 layers of config.json for 1 "
            "other stage, which get the same number each; the nearest that fits the model is 6"),
        (8, {"pp": 4, "last": 3}, "num_layers_in_last_pipeline_stage=3 leaves 5 of the 8 layers of config.json for 3 "
            "other stages, which get the same number each; the nearest that fits the model is 2"),
        (8, {"pp": 4, "first": 3, "last": 2}, "num_layers_in_first_pipeline_stage=3 and "
            "num_layers_in_last_pipeline_stage=2 leave 3 of the 8 layers of config.json for 2 other stages, which get "
            "the same number each; the nearest that fits the model is 2"),
        (8, {"pp": 2, "first": 3, "last": 2}, "num_layers_in_first_pipeline_stage=3 and "
            "num_layers_in_last_pipeline_stage=2 leave 3 of the 8 layers of config.json for no stage; the nearest that "
            "fits the model is 6"),
        (8, {"pp": 2, "first": 3, "vp": 2}, "num_layers_in_first_pipeline_stage=3 is no multiple of "
            "virtual_pipeline_model_parallel_size=2; the nearest that fits the model is 2"),
        (8, {"pp": 1, "vp": 2}, "virtual_pipeline_model_parallel_size=2 divides the layers among pipeline stages, and "
            "pipeline_model_parallel_size=1; leave virtual_pipeline_model_parallel_size out"),
        (7, {"pp": 2, "vp": 2}, "pipeline_model_parallel_size=2 does not divide the number of layers, 7, of "
            "config.json; no value of it fits with the other settings of the pipeline: give the layers of each stage "
            "in pipeline_model_parallel_layout"),
        (7, {"pp": 2, "layout": "Etttm|tttL"}, "pipeline_model_parallel_layout='Etttm|tttL' has 'm', which is not "
            "a known letter: E is the embedding, t a layer, L the loss; | begins the next chunk; x*3 or (xy)*3 "
            "repeats, as in 'Et*3|t*4L'"),
        (7, {"pp": 2, "layout": "Ett|tt|ttL"}, "pipeline_model_parallel_layout='Ett|tt|ttL' has 3 chunks, and "
            "megatron.pipeline_model_parallel_size=2 stages need the same number each: give 2 chunks, or a multiple of "
            "it"),
        (7, {"pp": 2, "vp": 4, "layout": "Et|tt|ttt|tL"}, "pipeline_model_parallel_layout='Et|tt|ttt|tL' has 4 chunks, "
            "2 on each of 2 stages, and megatron.virtual_pipeline_model_parallel_size=4: leave that out, or set it to "
            "2"),
        (7, {"pp": 2, "layout": "tttE|ttttL"}, "pipeline_model_parallel_layout='tttE|ttttL' must begin with E, the "
            "embedding, and have it once"),
        (7, {"pp": 2, "layout": "|EtttttttL"}, "pipeline_model_parallel_layout='|EtttttttL' must begin with E, the "
            "embedding, and have it once"),
        (7, {"pp": 2, "layout": "EtttL|ttttL"}, "pipeline_model_parallel_layout='EtttL|ttttL' must end with L, the "
            "loss, and have it once"),
        (7, {"pp": 2, "layout": "Ettt|tttL"}, "pipeline_model_parallel_layout='Ettt|tttL' has 6 layers (t), and "
            "config.json has 7: add 1"),
        (7, {"pp": 3, "layout": "Ettt||ttttL"}, "pipeline_model_parallel_layout='Ettt||ttttL' leaves stage 1 of 3 "
            "empty: give it a layer, or take fewer stages"),
    ],
)  # fmt: skip
def test_refused(layers, settings, told):
    with pytest.raises(UserError) as error:
        split(layers, **settings)
    assert str(error.value) == f"megatron.{told}"


@pytest.mark.parametrize(
    ("settings", "stage", "micro_batches", "wanted"),
    [
        ({"pp": 4}, 0, 9, (4,)),
        ({"pp": 4}, 3, 9, (1,)),
        ({"pp": 4}, 0, 2, (2,)),
        # Forward 0 1 of chunk 0, 0 1 of chunk 1, 2 of chunk 0; then one backward (chunk 1 first) after each forward.
        ({"pp": 2, "vp": 2}, 0, 8, (3, 2)),
        ({"pp": 2, "vp": 2}, 1, 8, (2, 1)),
        ({"pp": 2, "vp": 2}, 0, 1, (1, 1)),
    ],
)
def test_micro_batches_in_flight(settings, stage, micro_batches, wanted):
    assert in_flight(split(8, **settings), stage, micro_batches=micro_batches) == wanted


@pytest.mark.parametrize("stage", [0, 3])
def test_a_step_of_very_many_micro_batches_is_counted_at_once(stage):
    parts = split(16, pp=4, vp=2)
    many = in_flight(parts, stage, micro_batches=10**12)
    assert many == in_flight(parts, stage, micro_batches=40)
