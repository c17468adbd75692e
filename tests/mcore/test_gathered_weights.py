"""Messages and exports for servers wait for the weights that a step has left on other replicas."""

from types import SimpleNamespace

import pytest
import torch

from megatron_paint.base.errors import UserError
from megatron_paint.mcore import weight_source
from megatron_paint.mcore.weight_source import StageWeights


@pytest.fixture
def stage():
    """A stage whose only weight is complete after `complete_weights`."""
    weight = torch.zeros(2)
    return SimpleNamespace(
        weight=weight,
        named_parameters=lambda: iter([("final_layernorm.weight", weight)]),
        complete_weights=lambda: weight.fill_(torch.nan),
    )


def weights_of(stage) -> StageWeights:
    model = SimpleNamespace(dtype="float32", hf_path="m", adapter_path=None)
    return StageWeights(stage, shape=None, ranks=None, model=model)


def test_an_update_of_servers_begins_with_complete_weights(stage):
    with pytest.raises(UserError, match=r"final_layernorm\.weight is not finite"):
        weights_of(stage).check_finite()


def test_an_export_has_complete_weights(stage, monkeypatch, tmp_path):
    written = []
    monkeypatch.setattr(weight_source, "export_stage", lambda stage, folder, **how: written.append(stage.weight.sum()))
    weights_of(stage).export(tmp_path)
    assert written[0].isnan()
