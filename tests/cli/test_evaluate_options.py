"""What `evaluate` takes from settings: its own sections, or a training run's, which is checked as a complete file."""

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants

from megatron_paint.base.errors import UserError
from megatron_paint.cli.evaluate_model import fingerprint
from megatron_paint.cli.evaluate_options import requested
from megatron_paint.config.load import evaluate_settings_of, evaluation_section_of
from megatron_paint.config.settings import DataSettings, ModelSettings, RunSettings
from megatron_paint.planning.layout import data_parallel_size
from tests.support import hub_cache

ALONE = {"model": {"hf_path": "m"}, "evaluation": {"problems": "held_out.jsonl", "samples": 3}}
TRAINING = ALONE | {"data": {"train": "p.jsonl", "micro_batch_tokens": 512}, "run": {"dir": "r", "seed": 7}}


def test_an_evaluation_needs_no_training_settings():
    settings = evaluate_settings_of(ALONE)
    assert (settings.model.hf_path, settings.evaluation.samples) == ("m", 3)
    assert (settings.seed, settings.micro_batch_tokens) == (RunSettings.seed, DataSettings.micro_batch_tokens)
    assert evaluate_settings_of(ALONE | {"run": {"seed": 5}}).seed == 5
    assert evaluate_settings_of(ALONE | {"data": {"micro_batch_tokens": 64}}).micro_batch_tokens == 64


def test_a_training_file_will_do():
    settings = evaluate_settings_of(TRAINING | {"objective": {"name": "grpo"}})
    assert (settings.seed, settings.micro_batch_tokens) == (7, 512)
    assert settings.evaluation == evaluate_settings_of(ALONE).evaluation


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"evaluation": {"sample": 3}}, "unknown setting evaluation.sample: did you mean evaluation.samples?"),
        ({"evaluatoin": {}}, "unknown setting evaluatoin: did you mean evaluation?"),
        ({"optimizer": {"lrr": 1.0}}, "unknown setting optimizer.lrr: did you mean optimizer.lr?"),
        ({"objective": {"loss": {"fracton": 0.1}}}, "did you mean objective.loss.fraction?"),
        ({"data": {"train": "p", "micro_batch_tokens": 0}}, "data.micro_batch_tokens"),
        ({"run": {"seed": "one"}}, "run.seed"),
        ({"run": {"dirr": "r"}}, "did you mean run.dir?"),
        ({"optimizer": {"min_lr": 1.0}}, "optimizer.min_lr=1.0 is above"),
        ({"objective": {"name": "opsd", "reveal": {"rule": "overlap"}}}, "objective.name=opsd shows the complete"),
        ({"megatron": {"fp8": "hybrid"}, "model": {"hf_path": "m", "dtype": "float32"}}, "needs model.dtype=bfloat16"),
        ({"model": {}}, "model.hf_path is not set"),
    ],
)
@pytest.mark.parametrize("base", [ALONE, TRAINING], ids=["alone", "training"])
def test_mistakes_are_refused(base, changes, says):
    with pytest.raises(UserError) as error:
        evaluate_settings_of(base | changes)
    assert says in str(error.value)
    assert "is not set" not in str(error.value) or says.endswith("is not set")


def test_recorded_responses_need_no_model():
    assert evaluation_section_of({"evaluation": {"limit": 2}}).limit == 2
    with pytest.raises(UserError, match=r"did you mean evaluation.limit\?"):
        evaluation_section_of({"evaluation": {"limt": 2}})
    with pytest.raises(UserError, match=r"did you mean optimizer.lr\?"):
        evaluation_section_of({"optimizer": {"lrr": 2}})


def test_an_own_settings_file(tmp_path):
    file = tmp_path / "evaluate.yaml"
    file.write_text("model: {hf_path: m}\nevaluation: {problems: held_out.jsonl}\n")
    asked = requested(config=file, model=None, benchmarks=None, samples=2, out=None, overrides=["run.seed=4"])
    assert (asked.settings.seed, asked.settings.evaluation.samples) == (4, 2)
    assert (asked.model, asked.benchmarks, asked.out.parts) == ("m", ("held_out.jsonl",), ("evaluations", "m"))


def test_the_optimiser_of_a_training_run_does_not_count(tmp_path):
    """The run had groups of replicas; the evaluation may have one process, such as with servers of vLLM."""
    file = tmp_path / "train.yaml"
    file.write_text(
        "model: {hf_path: m}\nevaluation: {problems: held_out.jsonl}\n"
        "megatron: {num_distributed_optimizer_instances: 4}\n"
    )
    for engine in ("megatron", "vllm"):
        asked = requested(config=file, model=None, benchmarks=None, samples=None, engine=engine, out=None, overrides=[])
        assert data_parallel_size(1, asked.settings.megatron) == 1


def test_other_weights_in_the_same_place_are_noticed(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(300_000))
    before = fingerprint(tmp_path)
    (tmp_path / "notes.txt").write_text("any")
    assert fingerprint(tmp_path) == before
    for place in (0, 150_000, 299_999):
        content = bytearray(300_000)
        content[place] = 1
        file.write_bytes(content)
        assert fingerprint(tmp_path) != before


@pytest.mark.parametrize(
    ("name", "key"),
    [("config.json", "rope_theta"), ("config.json", "rms_norm_eps"), ("adapter_config.json", "lora_alpha")],
)
def test_another_config_beside_the_same_weights_is_noticed(tmp_path, name, key):
    (tmp_path / "model.safetensors").write_bytes(bytes(100))
    found = set()
    for value in (1e-6, 16, 32, 1e6):
        (tmp_path / name).write_text(json.dumps({"a": 1, key: value}))
        found.add(fingerprint(tmp_path))
    assert len(found) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give --model FOLDER, or a settings file"),
        ({"model": Path("nowhere")}, "nowhere does not exist; of a run, give RUN/hf/step_"),
        ({"model": "hf"}, "give --benchmarks"),
        ({"model": "hf", "benchmarks": "a.jsonl", "samples": 0}, "evaluation.samples"),
        ({"model": "bare", "benchmarks": "a.jsonl"}, "model.hf_path is not set: .* give one with --base"),
        ({"model": "broken", "benchmarks": "a.jsonl"}, "run_state.json is not readable"),
    ],
)
def test_what_cannot_be_evaluated(options, message, tmp_path):
    for name in ("hf", "bare", "broken"):
        (tmp_path / name).mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    (tmp_path / "bare" / ".metadata").write_text("")
    (tmp_path / "broken" / ".metadata").write_text("")
    (tmp_path / "broken" / "run_state.json").write_text("{}")
    if isinstance(options.get("model"), str):
        options = options | {"model": tmp_path / options["model"]}
    nothing = {"config": None, "model": None, "benchmarks": None, "samples": None, "out": None, "overrides": []}
    with pytest.raises(UserError, match=message):
        requested(**nothing | options)


NOTHING = {"config": None, "model": None, "benchmarks": "a.jsonl", "samples": None, "out": None, "overrides": []}


def make_folders(folder):
    """A complete model, an adapter of it, and a Megatron checkpoint below a folder of iterations."""
    for name in ("base", "adapter", "iterations/iter_0000005"):
        (folder / name).mkdir(parents=True)
    (folder / "base" / "config.json").write_text("{}")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": str(folder / "base")}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    (folder / "iterations" / "iter_0000005" / ".metadata").touch()
    (folder / "iterations" / "latest_checkpointed_iteration.txt").write_text("5")
    return tuple(folder / name for name in ("base", "adapter", "iterations"))


def test_an_adapter_is_merged_into_its_base(tmp_path):
    """The adapters of a training run's settings are not trained here."""
    base, adapter, _ = make_folders(tmp_path)
    file = tmp_path / "run.yaml"
    file.write_text("model: {hf_path: m, lora: {rank: 2}, megatron_path: other, dtype: float32}\n")
    asked = requested(**NOTHING | {"config": file, "model": adapter})
    model = ModelSettings(hf_path=str(base), adapter_path=str(adapter), dtype="float32")
    assert asked.settings.model == model
    assert asked.folders == (adapter, base)
    assert (asked.model, asked.out.name) == (str(adapter), "adapter")
    other = tmp_path / "moved"
    shutil.move(base, other)
    with pytest.raises(UserError, match=r"^--model: .*adapter is a PEFT adapter of .*base, which does not exist here"):
        requested(**NOTHING | {"model": adapter})
    assert requested(**NOTHING | {"model": adapter, "base": other}).folders == (adapter, other)


def test_a_megatron_checkpoint_with_its_base(tmp_path):
    base, _, iterations = make_folders(tmp_path)
    asked = requested(**NOTHING | {"model": iterations, "base": base})
    checkpoint = iterations / "iter_0000005"
    assert asked.settings.model == ModelSettings(hf_path=str(base), megatron_path=str(checkpoint))
    assert asked.folders == (checkpoint,)


def test_a_name_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    base, *_ = make_folders(tmp_path)
    for name in ("tokenizer.json", "model.safetensors"):
        (base / name).write_text("{}")
    snapshot = hub_cache.put(tmp_path / "hub", "acme/tiny", base)
    asked = requested(**NOTHING | {"model": Path("acme/tiny")})
    assert (asked.settings.model.hf_path, asked.folders) == (str(snapshot), (snapshot,))
    assert (asked.model, asked.out.name) == ("acme/tiny", "tiny")
    with pytest.raises(UserError, match=r"^--model: acme/other is no folder.*hf download acme/other$"):
        requested(**NOTHING | {"model": Path("acme/other")})


def test_a_base_that_nothing_needs_is_refused(tmp_path):
    base, *_ = make_folders(tmp_path)
    with pytest.raises(UserError, match="is a complete model: leave --base out"):
        requested(**NOTHING | {"model": base, "base": base})
    with pytest.raises(UserError, match="give --model too"):
        requested(**NOTHING | {"config": _settings(tmp_path), "base": base})


def _settings(folder):
    file = folder / "evaluate.yaml"
    file.write_text("model: {hf_path: m}\n")
    return file
