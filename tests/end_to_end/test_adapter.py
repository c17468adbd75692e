"""A LoRA run's exported adapter: evaluated like the merged model, and continued by the next run."""

import json

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from megatron_paint.cli.main import main
from tests.support import forked_ranks, tiny

LORA = ("model.lora={rank: 4, alpha: 8, export: adapter}", "evaluation.problems=null", "optimizer.lr=0.05")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder, settings) with a run of one step that exported an adapter, and the same model merged."""
    folder = tmp_path_factory.mktemp("adapter")
    tiny.make_model(folder / "model")
    tiny.make_problems(folder / "problems.jsonl")
    settings = tiny.make_settings(folder, folder / "model", folder / "problems.jsonl")
    ended = forked_ranks.train(folder, settings, *LORA, "run.steps=1", processes=1)
    assert ended.statuses == [0], ended
    checkpoint = folder / "run" / "checkpoints" / "step_000001"
    assert main(["convert", "to-hf", str(checkpoint), str(folder / "merged"), "--base", str(folder / "model")]) == 0
    return folder, settings


def answers(folder, model, out):
    """The greedy answers of `megatron-paint evaluate --model`."""
    arguments = ("--benchmarks", folder / "problems.jsonl", "--n", "1", "--out", out, "evaluation.limit=4")
    arguments += ("evaluation.max_new_tokens=8", "evaluation.thinking=false", "evaluation.greedy=true")
    ended = forked_ranks.run(out.parent, "evaluate", "--model", model, *arguments, "model.dtype=float32", processes=1)
    assert ended.statuses == [0], ended
    return json.loads((out / "problems.json").read_text())["answers"], ended.out[0]


def test_it_is_evaluated_as_the_merged_model(trained, tmp_path):
    folder, _ = trained
    adapter = folder / "run" / "hf" / "step_000001"
    found, printed = answers(folder, adapter, tmp_path / "adapter")
    assert f"the adapter {adapter} is merged into the weights of {folder / 'model'}" in " ".join(printed.split())
    assert found == answers(folder, folder / "merged", tmp_path / "merged")[0]
    assert found != answers(folder, folder / "model", tmp_path / "base")[0]
    tokenizer = json.loads((adapter / "tokenizer.json").read_text())
    assert tokenizer == json.loads((folder / "model" / "tokenizer.json").read_text())
    assert (adapter / "chat_template.jinja").read_text() == (folder / "model" / "chat_template.jinja").read_text()


def test_its_model_card_says_how_it_is_loaded(trained):
    folder, _ = trained
    card = ModelCard.load(folder / "run" / "hf" / "step_000001" / "README.md")
    assert (card.data.get("base_model"), card.data.library_name) == (None, "peft")
    assert "this folder holds the adapters alone" in card.text
    assert 'from_pretrained("BASE")' in card.text
    assert str(folder) not in card.content
    merged = ModelCard.load(folder / "merged" / "README.md")  # of convert to-hf
    assert (merged.data.get("base_model"), merged.data.library_name) == (None, "transformers")
    assert "the adapters are merged into the weights" in merged.text


def test_the_next_run_continues_from_it(trained, tmp_path):
    """With a learning rate near 0 it exports what it began with; the config of the run names adapter and base."""
    folder, settings = trained
    adapter = folder / "run" / "hf" / "step_000001"
    run = tmp_path / "run"
    overrides = (f"model.hf_path={adapter}", f"run.dir={run}", "run.steps=1", "optimizer.lr=1e-30")
    ended = forked_ranks.train(tmp_path, settings, *LORA, *overrides, processes=1)
    assert ended.statuses == [0], ended
    ours, theirs = (load_file(path / "adapter_model.safetensors") for path in (run / "hf" / "step_000001", adapter))
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], theirs[name], rtol=0, atol=1e-20) for name in theirs)
    assert max(theirs[name].abs().max() for name in theirs if "lora_B" in name) > 0.01
    config = (run / "config.yaml").read_text()
    assert f"adapter_path: {adapter}\n" in config
    assert f"hf_path: {folder / 'model'}\n" in config
