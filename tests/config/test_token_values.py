"""The settings of what is stored of single tokens: what is refused, and that a resumed run may change them."""

import pytest

from megatron_paint.base.errors import UserError
from megatron_paint.config.load import settings_of
from megatron_paint.config.saved import changes
from megatron_paint.config.tree import settings_tree


def settings(**run):
    return settings_of(
        {"model": {"hf_path": "m"}, "data": {"train": "t"}, "run": {"dir": "r", "resume": "auto", **run}}
    )


@pytest.mark.parametrize(
    ("run", "says"),
    [
        (
            {"keep_top_tokens": 5, "keep_token_values": 0},
            r"run\.keep_top_tokens=5 .* run\.keep_token_values, and that is 0",
        ),
        ({"keep_top_tokens": 21}, r"run\.keep_top_tokens"),
        ({"keep_top_tokens": -1}, r"run\.keep_top_tokens"),
        ({"keep_token_values": -1}, r"run\.keep_token_values"),
    ],
)
def test_refusals(run, says):
    with pytest.raises(UserError, match=says):
        settings(**run)


def test_a_resumed_run_may_change_them():
    old, new = (settings_tree(settings(**run)) for run in ({}, {"keep_top_tokens": 5, "keep_token_values": 2}))
    assert changes(old=old, new=new) == {}


def test_a_run_of_a_version_without_them_resumes():
    new = settings_tree(settings(keep_top_tokens=5))
    old = settings_tree(settings())
    del old["run"]["keep_top_tokens"], old["run"]["keep_token_values"]
    assert changes(old=old, new=new) == {}
