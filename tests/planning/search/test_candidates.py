"""Layouts: all of them, none twice, and what makes them settings."""

import dataclasses
from collections import Counter

import pytest

from megatron_paint.config.megatron import MegatronSettings
from megatron_paint.planning.search import as_settings
from megatron_paint.planning.search.as_settings import (
    DIMENSIONS,
    Dimension,
    megatron_changes,
    searched_dimensions,
    settings_for,
)
from megatron_paint.planning.search.candidate import Candidate, layouts, variants
from megatron_paint.planning.search.sizes import find_model
from tests.planning.search.asked import ask

DENSE, MIXTURE = find_model("qwen3_8b")[1], find_model("qwen3_30b_a3b")[1]
ALL = ("tp", "pp", "vpp", "balanced", "cp", "ep", "etp")


def test_the_layouts_of_16_ranks():
    """TP 1, 2, 4, 8, and PP times DP is the rest: 5 + 4 + 3 + 2."""
    found = list(layouts(DENSE, gpus=16, gpus_per_node=8, searched=("tp", "pp")))
    assert Counter(each.tp for each in found) == {1: 5, 2: 4, 4: 3, 8: 2}
    assert len(set(found)) == len(found)
    assert {each.gpus for each in found} == {16}


def test_a_dense_model_has_no_experts_to_share():
    found = list(layouts(DENSE, gpus=8, gpus_per_node=8, searched=ALL))
    assert {(each.ep, each.etp) for each in found} == {(1, 1)}
    assert {each.vpp for each in found if each.pp == 1} == {1}
    assert {each.cp for each in found} == {1, 2, 4, 8}


def test_experts_fill_the_ranks_of_a_stage():
    """TP 2 x DP 2, one stage: experts in 1, 2 or 4 parts, or 1 or 2 of which each is shared by two ranks."""
    found = [each for each in layouts(MIXTURE, gpus=4, gpus_per_node=8, searched=("tp", "pp", "ep", "etp"))]
    here = {(each.ep, each.etp, each.expert_dp) for each in found if (each.tp, each.pp) == (2, 1)}
    assert here == {(1, 1, 4), (2, 1, 2), (4, 1, 1), (1, 2, 2), (2, 2, 1)}
    without = layouts(MIXTURE, gpus=4, gpus_per_node=8, searched=("tp", "pp"))
    assert all((each.ep, each.etp) == (1, each.tp) for each in without)  # Megatron's default


def test_variants():
    found = variants(Candidate(tp=2), teacher=False, optimizer=False)
    assert [each.recompute for each in found] == ["none", "selective", "full"]
    assert len(variants(Candidate(tp=2), teacher=True, optimizer=False)) == 6
    assert len(set(variants(Candidate(tp=2), teacher=True, optimizer=True))) == 12


def test_settings_of_a_candidate():
    base = ask(config=None).settings
    settings = settings_for(base, Candidate(tp=4, pp=2, dp=2, recompute="full", teacher_offload=True), DENSE)
    megatron = settings.megatron
    assert (megatron.tensor_model_parallel_size, megatron.pipeline_model_parallel_size) == (4, 2)
    assert megatron.sequence_parallel
    assert (megatron.recompute_granularity, megatron.recompute_method, megatron.recompute_num_layers) == (
        "full",
        "uniform",
        1,
    )
    assert settings.objective.teacher.offload
    assert settings.data == base.data


@pytest.mark.parametrize("dimension", DIMENSIONS, ids=lambda each: each.name)
def test_a_dimension_that_the_settings_lack_is_not_searched(dimension, monkeypatch):
    fields = {field.name for field in dataclasses.fields(MegatronSettings)}
    assert dimension.exists == (set(dimension.settings) <= fields)
    absent = dataclasses.replace(dimension, settings=("no_such_setting",))
    monkeypatch.setattr(as_settings, "DIMENSIONS", (absent,))
    assert searched_dimensions(MIXTURE) == ()
    assert "no_such_setting" not in megatron_changes(Candidate(tp=2, vpp=2, cp=2, ep=2), MIXTURE)


def test_a_dimension_is_switched_on_by_its_setting(monkeypatch):
    """With a setting that exists, whatever it means: its value is that of the candidate, or its default if it is 1."""
    row = Dimension(name="cp", title="context", settings=("num_layers_at_start_in_bf16",))
    monkeypatch.setattr(as_settings, "DIMENSIONS", (row,))
    assert searched_dimensions(DENSE) == (row,)
    assert megatron_changes(Candidate(cp=4), DENSE)["num_layers_at_start_in_bf16"] == 4
    assert megatron_changes(Candidate(cp=1), DENSE)["num_layers_at_start_in_bf16"] == 1
    flag = dataclasses.replace(row, name="balanced", settings=("first_last_layers_bf16", "deterministic_mode"))
    monkeypatch.setattr(as_settings, "DIMENSIONS", (flag,))
    for balanced in (True, False):
        changes = megatron_changes(Candidate(pp=4, balanced=balanced), DENSE)
        assert changes["first_last_layers_bf16"] is changes["deterministic_mode"] is balanced
    experts = dataclasses.replace(row, experts=True)
    monkeypatch.setattr(as_settings, "DIMENSIONS", (experts,))
    assert searched_dimensions(DENSE) == ()
    assert searched_dimensions(MIXTURE) == (experts,)


def test_texts():
    layout = Candidate(tp=2, pp=4, vpp=2, dp=8, ep=16, balanced=True, recompute="full", teacher_offload=True)
    assert layout.layout_text() == "TP 2 x PP 4 x VP 2 x DP 8, EP 16, ends count"
    assert layout.savings_text() == "full recomputation, teacher on the host"
    assert (Candidate().layout_text(), Candidate().savings_text()) == ("one rank", "-")
