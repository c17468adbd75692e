"""What settings name a model by, and the folders that are found for it."""

import dataclasses
import json
import re

import pytest
from huggingface_hub import constants

from megatron_paint.base.errors import UserError
from megatron_paint.config.load import evaluate_settings_of
from megatron_paint.config.settings import (
    DataSettings,
    LoraSettings,
    ModelSettings,
    PromptSettings,
    RunSettings,
    Settings,
)
from megatron_paint.planning.local_model import with_local_model
from tests.support import hub_cache

CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def make_base(folder, *, template="the base's", tokens=("<a>",)):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").touch()
    added = [{"id": 100 + i, "content": token} for i, token in enumerate(tokens)]
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return folder


def make_adapter(folder, base, **more):
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | {"base_model_name_or_path": str(base)} | more))
    return folder


def settings_of(**model):
    return Settings(model=ModelSettings(**model), data=DataSettings(train="p"), run=RunSettings(dir="r"))


def test_folders_stay_as_they_are_given(tmp_path):
    make_base(tmp_path / "base")
    for name in ("base", "./base", "missing/model/folder", str(tmp_path / "base")):
        settings = settings_of(hf_path=name)
        assert with_local_model(settings) == settings


def test_a_name_on_the_hub(cache, tmp_path):
    snapshot = hub_cache.put(cache, "acme/tiny", make_base(tmp_path / "base"))
    found = with_local_model(settings_of(hf_path="acme/tiny"))
    assert found.model == ModelSettings(hf_path=str(snapshot))
    assert with_local_model(found) == found
    with pytest.raises(UserError, match=r"^model.hf_path: acme/other is no folder.*hf download acme/other$"):
        with_local_model(settings_of(hf_path="acme/other"))


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=4)])
def test_an_adapter_becomes_adapter_path_and_its_base_hf_path(lora, tmp_path):
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base)
    found = with_local_model(settings_of(hf_path=str(adapter), lora=lora))
    assert found.model == ModelSettings(hf_path=str(base), adapter_path=str(adapter), lora=lora)
    assert with_local_model(found) == found
    assert with_local_model(settings_of(hf_path=str(base), adapter_path=str(adapter), lora=lora)) == found


def test_a_base_on_the_hub_at_its_revision(cache, tmp_path):
    folder = make_base(tmp_path / "base")
    hub_cache.put(cache, "acme/tiny", folder)
    older = hub_cache.put(cache, "acme/tiny", folder, revision="1" * 40, branch="older")
    adapter = make_adapter(tmp_path / "adapter", "acme/tiny", revision="1" * 40)
    assert with_local_model(settings_of(hf_path=str(adapter))).model.hf_path == str(older)


def test_an_evaluation_too(tmp_path):
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base)
    settings = evaluate_settings_of({"model": {"hf_path": str(adapter)}})
    assert with_local_model(settings).model.adapter_path == str(adapter)


def test_what_is_refused(tmp_path):
    base = make_base(tmp_path / "base")
    lost, other = (make_adapter(tmp_path / name, at) for name, at in (("lost", tmp_path / "gone"), ("other", base)))
    nameless = make_adapter(tmp_path / "nameless", "")
    chained = make_adapter(tmp_path / "chained", other)
    refused = {
        f"{lost} is a PEFT adapter of {tmp_path / 'gone'}, which does not exist here": {"hf_path": str(lost)},
        f"model.hf_path=BASE model.adapter_path={lost}, or evaluate --base BASE": {"hf_path": str(lost)},
        f"{nameless} is a PEFT adapter that names no base": {"hf_path": str(nameless)},
        f"{other}, which is not a Hugging Face model": {"hf_path": str(chained)},
        "model.adapter_path names another": {"hf_path": str(other), "adapter_path": str(lost)},
        f"model.adapter_path: {base} is not a PEFT adapter": {"hf_path": str(base), "adapter_path": str(base)},
        "model.megatron_path would replace": {"hf_path": str(other), "megatron_path": str(base)},
    }
    for says, model in refused.items():
        with pytest.raises(UserError, match=re.escape(says)):
            with_local_model(settings_of(**model))


def test_a_folder_with_a_model_and_an_adapter_is_refused(tmp_path):
    """transformers would load the base of the adapter, and not the model in the folder."""
    both = make_base(tmp_path / "both")
    (both / "adapter_config.json").write_text(json.dumps(CONFIG | {"base_model_name_or_path": "elsewhere"}))
    with pytest.raises(UserError, match=r"holds a complete model \(model.safetensors\) and a PEFT adapter"):
        with_local_model(settings_of(hf_path=str(both)))
    (both / "model.safetensors").unlink()  # some trainers copy config.json beside an adapter
    base = make_base(tmp_path / "base")
    (both / "adapter_config.json").write_text(json.dumps(CONFIG | {"base_model_name_or_path": str(base)}))
    assert with_local_model(settings_of(hf_path=str(both))).model.adapter_path == str(both)


def test_the_adapters_own_chat_template_is_used(tmp_path):
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base)
    settings = settings_of(hf_path=str(adapter))
    (adapter / "chat_template.jinja").write_text("the base's\n")
    assert with_local_model(settings).prompts.chat_template is None
    (adapter / "chat_template.jinja").write_text("the adapter's")
    assert with_local_model(settings).prompts.chat_template == str(adapter / "chat_template.jinja")
    given = dataclasses.replace(settings, prompts=PromptSettings(chat_template="given"))
    assert with_local_model(given).prompts.chat_template == "given"
    (adapter / "chat_template.jinja").unlink()
    (adapter / "tokenizer_config.json").write_text(json.dumps({"chat_template": "the adapter's"}))
    with pytest.raises(UserError, match=r"tokenizer_config.json has another chat template.*set prompts.chat_template"):
        with_local_model(settings)
    assert with_local_model(given).prompts.chat_template == "given"


def test_an_adapter_with_more_tokens_is_refused(tmp_path):
    """Its new tokens would be cut into pieces by the base's tokenizer."""
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base)
    tokens = [{"id": 100, "content": "<a>"}, {"id": 101, "content": "<b>"}]
    (adapter / "tokenizer.json").write_text(json.dumps({"added_tokens": tokens}))
    with pytest.raises(UserError, match=r"has the token '<b>' with the id 101, which that of its base"):
        with_local_model(settings_of(hf_path=str(adapter)))
