"""Checkpoints of LoRA runs: the merged model equals the run's export, and the adapters load as a PEFT adapter."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import Qwen3ForCausalLM

from megatron_paint.cli.main import main
from tests.support import forked_ranks, tiny

LORA = ("model.lora={rank: 4, alpha: 8}", "run.steps=2", "optimizer.lr=0.05", "evaluation.problems=null")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Returns (model folder, run folder) of two steps with adapters at tensor parallel 2."""
    layout = "tensor_model_parallel_size: 2, sequence_parallel: true"
    return train(tmp_path_factory.mktemp("lora"), layout)


def train(folder, layout, *arguments, processes=2):
    tiny.make_model(folder / "model")
    tiny.make_problems(folder / "problems.jsonl")
    settings = tiny.make_settings(folder, folder / "model", folder / "problems.jsonl", layout=layout)
    ended = forked_ranks.train(folder, settings, *LORA, *arguments, processes=processes)
    assert ended.statuses == [0] * processes, ended
    return folder / "model", folder / "run"


def to_hf(trained, out, *arguments):
    model, run = trained
    checkpoint = run / "checkpoints" / "step_000002"
    command = ["convert", "to-hf", str(checkpoint), str(out), "--base", str(model), "--quiet", *arguments]
    assert main(command) == 0
    return out


def test_merged_equals_the_runs_export(trained, tmp_path):
    ours = load_file(to_hf(trained, tmp_path / "out") / "model.safetensors")
    theirs = load_file(trained[1] / "hf" / "step_000002" / "model.safetensors")
    base = load_file(trained[0] / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        # The products of B and A are cut in other places: float32's rounding.
        torch.testing.assert_close(ours[name], tensor, rtol=1e-6, atol=1e-6)
    changed = [name for name in ours if not torch.equal(ours[name], base[name])]
    assert len(changed) == 2 * 7


def test_adapter_on_the_base_gives_the_same_logits(trained, tmp_path):
    adapter = to_hf(trained, tmp_path / "adapter", "--lora", "adapter")
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        base = Qwen3ForCausalLM.from_pretrained(trained[0])
        before = base(ids).logits
        found = PeftModel.from_pretrained(base, adapter)(ids).logits
        wanted = Qwen3ForCausalLM.from_pretrained(trained[1] / "hf" / "step_000002")(ids).logits
    assert (wanted - before).abs().max() > 1e-3
    assert (found - wanted).abs().max() / wanted.abs().max() < 2e-5


def test_a_live_run_exports_adapters(tmp_path):
    """Two stages of two tensor-parallel ranks export the same file as the converter does from the run's checkpoint."""
    layout = "tensor_model_parallel_size: 2, pipeline_model_parallel_size: 2, sequence_parallel: true"
    found = train(tmp_path, layout, "model.lora.export=adapter", processes=4)
    live, made = found[1] / "hf" / "step_000002", to_hf(found, tmp_path / "adapter", "--lora", "adapter")
    assert sorted(path.name for path in live.iterdir()) == sorted(path.name for path in made.iterdir())
    for folder in (live, made):
        assert len({path.stat().st_mode for path in folder.iterdir()}) == 1, folder
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (live, made))
    assert ours.keys() == theirs.keys()
    assert len(ours) == 2 * 2 * 7
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert json.loads((live / "adapter_config.json").read_text()) == json.loads(
        (made / "adapter_config.json").read_text()
    )
    loaded = PeftModel.from_pretrained(Qwen3ForCausalLM.from_pretrained(found[0]), live)
    assert sum(p.abs().sum() for name, p in loaded.named_parameters() if "lora_B" in name) > 0


def test_adapters_are_one_file(trained, tmp_path, capsys):
    command = ["convert", "to-hf", str(trained[1]), str(tmp_path / "out"), "--base", str(trained[0])]
    assert main([*command, "--lora", "adapter", "--shard-size", "1MB"]) == 2
    assert "--shard-size: PEFT reads adapters from one file" in capsys.readouterr().err


def test_a_checkpoint_without_adapters_has_none_to_give(trained, tmp_path, capsys):
    assert main(["convert", "to-megatron", str(trained[0]), str(tmp_path / "plain"), "--quiet"]) == 0
    command = ["convert", "to-hf", str(tmp_path / "plain"), str(tmp_path / "out"), "--base", str(trained[0])]
    assert main([*command, "--lora", "adapter"]) == 2
    assert "has no adapters" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_not_converted(trained, tmp_path, capsys):
    adapter = to_hf(trained, tmp_path / "adapter", "--lora", "adapter")
    for command in (["to-megatron", str(adapter), str(tmp_path / "out")], ["check", str(adapter), str(trained[1])]):
        assert main(["convert", *command]) == 2
        assert f"{adapter} is a PEFT adapter, which is not converted" in capsys.readouterr().err
