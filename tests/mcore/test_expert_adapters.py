"""A run of adapters on a mixture's experts: its folder is PEFT's, and a conversion of its checkpoint is the same."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import Qwen3MoeForCausalLM

from megatron_paint.convert.folders import convert_to_hf
from tests.checkpoints.test_stacked_adapters import ATTENTION, BOTH, make_adapter
from tests.mcore import parity_cases as parity
from tests.mcore.expert_adapter_worker import sequences
from tests.mcore.expert_cases import make_checkpoints
from tests.mcore.layouts import run_worker
from tests.mcore.peft_logprobs import peft_logprobs
from tests.mcore.plain_runs import by_expert
from tests.support.exports import same, weights


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    make_checkpoints(folder)
    base = parity.checkpoint(folder, "start", tied=False, experts=True)
    (base / "tokenizer_config.json").write_text("{}")
    make_adapter(base, folder / "adapter", r=4, target_modules=ATTENTION, target_parameters=BOTH)
    return folder


@pytest.fixture(scope="module", params=["experts-tp1", "tp2-ep2-etp1", "pp2-ep2"])
def output(request, models, tmp_path_factory):
    out = tmp_path_factory.mktemp(request.param)
    run_worker("expert_adapter_worker", request.param, models, models / "adapter", out)
    return out


def logprobs(models, adapter) -> list[list[float]]:
    """Of PEFT's model."""
    base = Qwen3MoeForCausalLM.from_pretrained(parity.checkpoint(models, "start", tied=False, experts=True))
    return peft_logprobs(base, adapter, sequences())


@pytest.mark.parametrize("key", ["start", "trained"])
def test_an_export_is_the_model_in_peft(key, models, output):
    found = torch.load(output / "found.pt", weights_only=False)
    for one, other in zip(found[key], logprobs(models, output / key), strict=True):
        assert one == pytest.approx(other, abs=2e-5)


def test_an_untrained_export_is_the_adapter(models, output):
    ours, theirs = (
        load_file(folder / "adapter_model.safetensors") for folder in (output / "start", models / "adapter")
    )
    assert same(ours, theirs)
    config = json.loads((output / "start" / "adapter_config.json").read_text())
    assert config["target_modules"] == ATTENTION
    assert config["target_parameters"] == BOTH
    notes = torch.load(output / "found.pt", weights_only=False)["notes"]
    assert notes == (f"the adapters continue from {models / 'adapter'}",)


def test_training_changes_the_experts_adapters(output):
    before, after = (load_file(output / key / "adapter_model.safetensors") for key in ("start", "trained"))
    experts = [name for name in after if ".mlp.experts." in name]
    assert len(experts) == 4 * 2 * 2
    assert not any(torch.equal(before[name], after[name]) for name in experts)


def test_a_converted_checkpoint_is_the_export(models, output, tmp_path):
    base = parity.checkpoint(models, "start", tied=False, experts=True)
    convert_to_hf(output / "checkpoint", tmp_path / "adapter", base=base, lora="adapter")
    ours, theirs = (load_file(f / "adapter_model.safetensors") for f in (tmp_path / "adapter", output / "trained"))
    assert same(ours, theirs)


def test_a_merged_conversion_is_peft_s_merge(models, output, tmp_path):
    base = parity.checkpoint(models, "start", tied=False, experts=True)
    convert_to_hf(output / "checkpoint", tmp_path / "merged", base=base)
    model = PeftModel.from_pretrained(Qwen3MoeForCausalLM.from_pretrained(base), output / "trained")
    wanted, found = by_expert(model.merge_and_unload().state_dict()), weights(tmp_path / "merged")
    assert found.keys() == wanted.keys()
    for name in found:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-6, atol=1e-6)
