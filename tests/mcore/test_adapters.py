"""`model.adapter_path` against PEFT: the start of a run's adapters, the initial teacher, and merged adapters."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import Qwen3ForCausalLM

from tests.checkpoints.test_adapter_reader import ALL, make_adapter
from tests.mcore import parity_cases as parity
from tests.mcore.adapter_worker import sequences
from tests.mcore.layouts import run_worker
from tests.mcore.peft_logprobs import peft_logprobs
from tests.support.exports import weights

ADAPTERS = {
    "all": {"target_modules": ALL},
    "some": {"target_modules": ["q_proj", "down_proj"], "use_rslora": True, "lora_alpha": 3},  # scale 1.5, as 6 / 4
    "dora": {"target_modules": ALL, "use_dora": True, "modules_to_save": ["lm_head", "embed_tokens"]},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    parity.make_checkpoints(folder)
    base = parity.checkpoint(folder, "start", tied=False)
    (base / "tokenizer_config.json").write_text("{}")
    (base / "chat_template.jinja").write_text("the base's")
    for name, config in ADAPTERS.items():
        make_adapter(base, folder / name, **config)
    (folder / "all" / "chat_template.jinja").write_text("the adapter's")
    return folder


@pytest.fixture(scope="module")
def outputs(models, tmp_path_factory):
    """Output folder by layout; the second loads the checkpoint of the first."""
    found, saved = {}, tmp_path_factory.mktemp("none") / "none"
    for layout in ("tp1", "tp2-pp2-sp", "pp2-vp2"):
        out = found[layout] = tmp_path_factory.mktemp(layout)
        run_worker("adapter_worker", layout, models, models, saved, out)
        saved = out / "checkpoint"
    return found


@pytest.fixture(params=["tp1", "tp2-pp2-sp", "pp2-vp2"])
def output(request, outputs):
    return outputs[request.param]


def read(out):
    return torch.load(out / "found.pt", weights_only=False)


def logprobs(models, adapter) -> list[list[float]]:
    """Of PEFT's model."""
    base = Qwen3ForCausalLM.from_pretrained(parity.checkpoint(models, "start", tied=False))
    return peft_logprobs(base, adapter, sequences())


def assert_equal(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        assert one == pytest.approx(other, abs=2e-5)


@pytest.mark.parametrize(("key", "adapter"), [("start", "all"), ("some", "some"), ("dora", "dora"), ("teacher", "all")])
def test_logprobs_are_those_of_peft(key, adapter, models, output):
    """`teacher`: the initial teacher keeps the adapters that the run began with, while they are trained."""
    assert_equal(read(output)[key], logprobs(models, models / adapter))


def test_the_trained_adapter_is_the_trained_model(models, output):
    found = read(output)
    before, after = (torch.tensor([v for values in found[key] for v in values]) for key in ("start", "trained"))
    assert (after - before).abs().max() > 1e-2
    assert_equal(found["trained"], logprobs(models, output / "trained"))


def test_an_untrained_export_is_the_adapter(models, output):
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (output / "start", models / "all"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    config = json.loads((output / "start" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 6)
    assert config["base_model_name_or_path"] == str(parity.checkpoint(models, "start", tied=False))
    assert (output / "start" / "tokenizer_config.json").is_file()
    assert (output / "start" / "chat_template.jinja").read_text() == "the adapter's"


def test_a_checkpoint_has_the_initial_teacher(models, outputs):
    found = read(outputs["tp2-pp2-sp"])
    assert_equal(found["loaded teacher"], logprobs(models, models / "all"))
    assert_equal(found["loaded"], read(outputs["tp1"])["trained"])


def test_the_merged_model_is_exported(models, output):
    base = Qwen3ForCausalLM.from_pretrained(parity.checkpoint(models, "start", tied=False))
    wanted = PeftModel.from_pretrained(base, models / "dora").merge_and_unload().state_dict()
    found = weights(output / "dora")
    assert found.keys() == wanted.keys()
    for name in found:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-6, atol=1e-6)


def test_a_line_says_what_becomes_of_the_adapter(models, output):
    found = read(output)
    assert found["notes"] == (f"the adapters continue from {models / 'all'}",)
    assert found["some notes"][0].endswith(f"{models / 'some'}; 20 projections that it leaves out start new")
    base = parity.checkpoint(models, "start", tied=False)
    assert found["dora notes"] == (f"the adapter {models / 'dora'} is merged into the weights of {base}",)
