"""Settings that divide the layers among pipeline stages: at most one rule, and only with several stages."""

import pytest

from megatron_paint.base.errors import UserError
from megatron_paint.config.load import settings_of
from megatron_paint.config.saved import forbidden_changes
from megatron_paint.config.tree import settings_tree

SMALLEST = {"model": {"hf_path": "m"}, "data": {"train": "p.jsonl"}, "run": {"dir": "r"}}
FIRST, LOSS = "num_layers_in_first_pipeline_stage", "account_for_loss_in_pipeline_split"
LAYOUT, CHUNKS = "pipeline_model_parallel_layout", "virtual_pipeline_model_parallel_size"


def settings(pp: int, **megatron):
    return settings_of(SMALLEST | {"megatron": {"pipeline_model_parallel_size": pp, **megatron}})


@pytest.mark.parametrize(
    "given",
    [{}, {FIRST: 4}, {LOSS: True}, {LAYOUT: "Et|tL"}, {CHUNKS: 2}, {FIRST: 4, CHUNKS: 2}, {LAYOUT: "Et|tL", CHUNKS: 1}],
)
def test_one_rule_is_accepted(given):
    found = settings(2, **given).megatron
    assert all(getattr(found, name) == value for name, value in given.items())


@pytest.mark.parametrize(
    ("pp", "given", "told"),
    [
        (1, {FIRST: 4}, f"megatron.{FIRST} divides the layers among pipeline stages, and "
            f"megatron.pipeline_model_parallel_size=1; leave {FIRST} out, or set pipeline_model_parallel_size"),
        (1, {CHUNKS: 2}, f"megatron.{CHUNKS} divides the layers among pipeline stages, and "
            f"megatron.pipeline_model_parallel_size=1; leave {CHUNKS} out, or set pipeline_model_parallel_size"),
        (2, {FIRST: 4, LOSS: True}, f"megatron.{FIRST} and megatron.{LOSS} are two rules for the layers of each "
            "pipeline stage: leave one of them out"),
        (2, {LAYOUT: "Et|tL", LOSS: True}, f"megatron.{LAYOUT} and megatron.{LOSS} are two rules for the layers of "
            "each pipeline stage: leave one of them out"),
    ],
)  # fmt: skip
def test_a_contradiction_is_refused(pp, given, told):
    with pytest.raises(UserError) as error:
        settings(pp, **given)
    assert told in str(error.value)


def test_a_resumed_run_may_change_them():
    """Also a run of a version that did not have them."""
    old, new = settings_tree(settings(1)), settings_tree(settings(2, **{CHUNKS: 2, FIRST: 4}))
    assert forbidden_changes(old=old, new=new) == []
    for name in (FIRST, LOSS, LAYOUT, CHUNKS):
        del old["megatron"][name]
    assert forbidden_changes(old=old, new=new) == []
