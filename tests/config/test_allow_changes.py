"""`run.allow_changes`: what a resumed run may change."""

import pytest

from megatron_paint.base.errors import UserError
from megatron_paint.config.allow_changes import check_allow_changes


def test_settings_that_no_checkpoint_holds():
    check_allow_changes(["optimizer.lr", "data.train", "rollout.temperature"])


@pytest.mark.parametrize(
    "name",
    [
        "objective.name",
        "objective.teacher.weights",  # an average would be loaded as the initial weights
        "objective.teacher.ema_anchor",
        "objective.loss.support",
        "objective.loss.partner",
        "model.dtype",
        "model.adapter_path",
        "model.lora.rank",
        "optimizer.beta2",
    ],
)
def test_what_a_checkpoint_holds(name):
    with pytest.raises(UserError, match=f"run.allow_changes: {name} cannot change when a run resumes"):
        check_allow_changes([name])


@pytest.mark.parametrize(
    ("name", "message"), [("objective.teacher", "is a section"), ("optimizer.lrr", "optimizer.lr")]
)
def test_names_that_are_no_settings(name, message):
    with pytest.raises(UserError, match=message):
        check_allow_changes([name])
