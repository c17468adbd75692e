"""The planned layers of each stage and chunk are those of Megatron-Core's own functions, over a grid of settings."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_paint.base.errors import UserError
from megatron_paint.config.megatron import MegatronSettings
from megatron_paint.mcore.model import _pipeline_settings
from megatron_paint.planning.stages import DIVIDING, FIRST, LAST, PIPELINE, VIRTUAL, split_layers
from tests.planning.test_stages import SHAPE

ENDS = [
    *product((None, 1, 2, 3), (None, 1, 2), (False,), (False,)),
    *product((None,), (None,), (False, True), (False, True)),
]


def of_megatron(layers: int, megatron: MegatronSettings, *, repaired: bool = True) -> list[list[range]] | None:
    """The layers of each chunk of each stage; None: Megatron refuses the settings.

    repaired: with the settings as the model passes them on.
    """
    pp, virtual = megatron.pipeline_model_parallel_size, megatron.virtual_pipeline_model_parallel_size
    chunks = range(virtual or 1)
    given = {"virtual_pipeline_model_parallel_size": virtual, **{name: getattr(megatron, name) for name in DIVIDING}}
    if repaired:
        given |= _pipeline_settings(megatron)
    try:
        config = TransformerConfig(
            num_layers=layers,
            hidden_size=8,
            num_attention_heads=1,
            pipeline_dtype=torch.float32,
            pipeline_model_parallel_size=pp,
            **given,
        )
        found = []
        for stage in range(pp):
            places = [{"vp_stage": chunk if virtual else None, "pp_rank": stage} for chunk in chunks]
            counts = [get_num_layers_to_build(config, **place) for place in places]
            begins = [get_transformer_layer_offset(config, **place) for place in places]
            assert min(counts) >= 0  # Megatron itself accepts a first stage of 2 layers of a model of 1
            found.append([range(b, b + n) for b, n in zip(begins, counts, strict=True)])
    except (ValueError, AssertionError):
        return None
    return found


def ours(layers: int, megatron: MegatronSettings) -> tuple[list[list[range]] | None, str]:
    """Our layers of each chunk of each stage, and our message if we refuse the settings."""
    try:
        split = split_layers(replace(SHAPE, num_layers=layers), megatron)
    except UserError as error:
        return None, str(error)
    return [list(stage) for stage in split.layers], ""


def listed(layers: list[list[range]] | None) -> list | None:
    """Of an empty chunk only the size counts."""
    return layers and [[list(chunk) for chunk in stage] for stage in layers]


@pytest.mark.parametrize("layers", range(1, 11))
@pytest.mark.parametrize("virtual", [None, 2])
def test_the_grid(layers, virtual):
    for pp, (first, last, embedding, loss) in product((2, 3, 4), ENDS):
        megatron = MegatronSettings(
            pipeline_model_parallel_size=pp,
            virtual_pipeline_model_parallel_size=virtual,
            num_layers_in_first_pipeline_stage=first,
            num_layers_in_last_pipeline_stage=last,
            account_for_embedding_in_pipeline_split=embedding,
            account_for_loss_in_pipeline_split=loss,
        )
        found, told = ours(layers, megatron)
        if (nearest := told.rpartition("the nearest that fits the model is ")[2]).isdecimal():
            name = told.removeprefix("megatron.").split("=")[0]
            assert of_megatron(layers, replace(megatron, **{name: int(nearest)})) is not None, told
        wanted = of_megatron(layers, megatron, repaired=found is not None)
        assert listed(found) == listed(wanted), megatron


@pytest.mark.parametrize(
    ("text", "pp"),
    [
        ("Et*3|t*4L", 2),
        ("Ettt|(tt|)*2,L", 4),
        ("E|ttt|tttt|L", 4),
        ("E|ttt|tttt|L", 2),
        ("E|(t|)*6tL", 2),
        ("E(t*2|)*3tL", 4),
        ("E(t|t)*2,tt|t*2,|L", 5),
    ],
)
def test_layouts(text, pp, monkeypatch):
    wanted = PipelineParallelLayerLayout(text, pp)
    virtual = wanted.virtual_pipeline_model_parallel_size
    monkeypatch.setattr(parallel_state, "_VIRTUAL_PIPELINE_MODEL_PARALLEL_WORLD_SIZE", virtual)
    layers = len(wanted.flatten_layout) - 2  # without the embedding and the loss
    megatron = MegatronSettings(pipeline_model_parallel_size=pp, pipeline_model_parallel_layout=text)
    found = split_layers(replace(SHAPE, num_layers=layers), megatron)
    for stage, chunks in enumerate(found.layers):
        for chunk, numbers in enumerate(chunks):
            assert list(numbers) == wanted.get_layer_id_list(vp_stage=chunk, pp_rank=stage)


def test_two_counts_for_two_stages_with_chunks():
    """Megatron divides by the number of stages between them; one count says the same."""
    both = {PIPELINE: 2, VIRTUAL: 2, FIRST: 4, LAST: 2}
    with pytest.raises(ZeroDivisionError):
        of_megatron(6, MegatronSettings(**both), repaired=False)
    assert of_megatron(6, MegatronSettings(**both)) == [[range(2), range(3, 5)], [range(2, 3), range(5, 6)]]


def test_the_grid_has_both():
    """Some settings of the grid fit and some do not, with first and last counts as well."""
    ends = MegatronSettings(pipeline_model_parallel_size=3, **{FIRST: 2, LAST: 1})
    assert of_megatron(5, ends) is not None
    assert of_megatron(3, ends) is None
