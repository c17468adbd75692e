"""The losses of a mixture's routers: with which other settings they work."""

import pytest

from megatron_paint.base.errors import UserError
from megatron_paint.config.load import settings_of

SMALLEST = {"model": {"hf_path": "m"}, "data": {"train": "p.jsonl"}, "run": {"dir": "r"}}
AUX = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 1e-3}
Z = {"moe_z_loss_coeff": 1e-3}


@pytest.mark.parametrize("losses", [AUX, Z, AUX | Z])
@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"context_parallel_size": 2, "expert_model_parallel_size": 2},
        {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    ],
)
def test_they_are_accepted_at_every_layout(layout, losses):
    found = settings_of(SMALLEST | {"megatron": {**layout, **losses}})
    assert found.megatron.has_auxiliary_loss


@pytest.mark.parametrize(
    ("losses", "others", "told"),
    [
        (AUX, {"model": {"hf_path": "m", "lora": {}}}, "megatron.moe_aux_loss_coeff is a loss of the routers, which "
            "model.lora freezes: leave one of them out"),
        (Z, {"objective": {"loss": {"elsewhere": "skip"}}}, "megatron.moe_z_loss_coeff is scaled by the number of "
            "tokens that carry loss. With objective.loss.elsewhere=skip this number is known only after the pass"),
    ],
)  # fmt: skip
def test_a_contradiction_is_refused(losses, others, told):
    with pytest.raises(UserError) as error:
        settings_of(SMALLEST | others | {"megatron": losses})
    assert told in str(error.value)
