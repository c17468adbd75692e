"""What `megatron-paint settings` and docs/settings.md know of each setting."""

import dataclasses

import pytest
from ruamel.yaml import YAML

from megatron_paint.base.errors import UserError
from megatron_paint.config import describe
from megatron_paint.config.dialect import OPSD_GRPO
from megatron_paint.config.load import settings_of
from megatron_paint.config.saved import dotted
from megatron_paint.config.tree import settings_tree

SMALLEST = {"model": {"hf_path": "m", "lora": {}}, "data": {"train": "p.jsonl"}, "run": {"dir": "r"}}
ENVIRONMENT = "rollout.vllm.environment"
SMALLEST["run"]["profile"] = {"steps": [1]}
SMALLEST |= {"domains": {"NAME": {}}}
KNOWN = {setting.key: setting for section in describe.sections() for setting in section.settings}


def test_every_setting_is_described_with_its_default():
    resolved = dotted(settings_tree(settings_of(SMALLEST)))
    mappings = {"data.columns.views", "evaluation.columns.views", ENVIRONMENT}
    assert set(KNOWN) == {*resolved, "model.lora", "run.profile", *mappings}
    for key, value in resolved.items():
        assert KNOWN[key].needed == (key in ("model.hf_path", "data.train", "run.dir", "run.profile.steps"))
        assert KNOWN[key].needed or KNOWN[key].default == value, key


def test_a_mapping_is_described_with_its_default():
    """Its names are the user's, so they are no settings that are known."""
    views = KNOWN["data.columns.views"]
    assert (views.type, views.allowed, views.default, views.default_text) == ("text by name", "", {}, "{}")
    assert settings_of(SMALLEST).data.columns.views == {}


def test_nothing_is_left_without_words():
    assert all(section.meaning for section in describe.sections())
    for setting in KNOWN.values():
        assert setting.meaning, setting.key
        assert bool(setting.source) != setting.needed, setting.key


@pytest.mark.parametrize(
    ("key", "type", "allowed", "default", "source"),
    [
        ("optimizer.lr", "number", "above 0", "5e-06", "OPSD, arXiv 2601.18734"),
        ("optimizer.beta2", "number", "at least 0, below 1", "0.999", "AdamW's usual value"),
        ("objective.reveal.minimum", "number", "at least 0, at most 1", "0.3", "ours"),
        ("objective.grpo.samples_per_problem", "integer", "at least 2", "8", OPSD_GRPO),
        ("objective.loss.jsd_beta", "number", "above 0, below 1", "0.5", "ours"),
        ("objective.kernel", "choice", "auto, torch, triton", "auto", "ours"),
        ("megatron.fp8", "choice or null", "e4m3, hybrid", "null", "Megatron-Core's name and default"),
        ("run.keep_last", "integer or null", "at least 1", "null", "ours"),
        ("run.tensorboard", "true or false", "", "true", "ours"),
        ("rollout.cache_bytes", "number", "above 0", "2e+10", "ours"),
        ("model.lora", "section or null", "", "null", "ours"),
        ("run.dir", "text", "", "none, must be set", ""),
    ],
)  # fmt: skip
def test_descriptions_by_hand(key, type, allowed, default, source):
    found = KNOWN[key]
    assert (found.type, found.allowed, found.default_text, found.source) == (type, allowed, default, source)


def test_a_default_s_text_is_the_default_in_a_settings_file():
    for setting in KNOWN.values():
        if not setting.needed:
            assert YAML(typ="safe", pure=True).load(setting.default_text) == setting.default, setting.key


def test_a_key_finds_a_section_with_those_inside_it_or_one_setting():
    assert [s.key for s in describe.find("data")] == ["data", "data.columns"]
    (section,) = describe.find("run.steps")
    assert (section.key, [s.key for s in section.settings]) == ("run", ["run.steps"])
    assert {s.key for s in describe.find("objective")} == {
        *("objective", "objective.reveal", "objective.loss", "objective.teacher", "objective.grpo"),
    }


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("optimizer.lrr", "did you mean optimizer.lr?"),
        ("optimiser", "did you mean optimizer?"),
        ("clip", "did you mean objective.loss.clip?"),
        ("temperature", "objective.loss.temperature or rollout.temperature or evaluation.temperature"),
        ("zzzz", "megatron-paint settings prints all keys"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest(key, says):
    with pytest.raises(UserError, match=f"^unknown setting {key}: ") as error:
        describe.find(key)
    assert says in str(error.value)


def test_a_description_never_changes():
    with pytest.raises(dataclasses.FrozenInstanceError):
        KNOWN["run.steps"].meaning = "x"
