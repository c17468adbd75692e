"""Checkpoints of other Megatron programs: a padded vocabulary, and the folder above the iterations."""

import json
import shutil

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from megatron_paint.cli.main import main
from tests.convert.family import COMMON
from tests.support import hub_cache
from tests.support.exports import same, weights

SIZE, PADDED = 60, 128


def make(folder, rows, tied):
    """The same model with random rows up to `rows`."""
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(**COMMON | {"vocab_size": PADDED}, intermediate_size=96, tie_word_embeddings=tied)
    )
    model.resize_token_embeddings(rows)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def folders(request, tmp_path):
    """(model, folder above a Megatron checkpoint of the same model with a padded vocabulary)."""
    base = make(tmp_path / "base", SIZE, request.param)
    other = make(tmp_path / "other", PADDED, request.param)
    assert main(["convert", "to-megatron", str(other), str(tmp_path / "run" / "iter_0000005"), "--quiet"]) == 0
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("5")
    return base, tmp_path / "run"


def test_rows_beyond_the_vocabulary_are_left_out_and_said(folders, tmp_path, capsys):
    base, run = folders
    assert main(["convert", "to-hf", str(run), str(tmp_path / "out"), "--base", str(base)]) == 0
    assert same(weights(tmp_path / "out"), weights(base))
    told = [line for line in capsys.readouterr().out.splitlines() if "padding" in line]
    untied = "lm_head.weight" in load_file(base / "model.safetensors")
    assert len(told) == 1 + untied
    assert (
        f"embedding.word_embeddings.weight has {PADDED} rows and the vocabulary of {base}/config.json has {SIZE}"
        in told[0]
    )
    assert f"the {PADDED - SIZE} rows beyond it are padding and are left out" in told[0]
    assert str(run / "iter_0000005") in told[0]


def test_json_has_the_line(folders, tmp_path, capsys):
    base, run = folders
    assert main(["convert", "to-hf", str(run), str(tmp_path / "out"), "--base", str(base), "--json"]) == 0
    assert "rows beyond it are padding" in json.loads(capsys.readouterr().out)["notes"][0]


def test_the_manifest_of_a_conversion_still_finds_a_change(folders, tmp_path, capsys):
    """The checksums of the padded tensors are of other rows; those of the others are compared."""
    base, run = folders
    manifest = run / "iter_0000005" / "conversion.json"
    content = json.loads(manifest.read_text())
    content["tensors"]["model.norm.weight"]["sha256"] = "0" * 64
    manifest.write_text(json.dumps(content))
    assert main(["convert", "to-hf", str(run), str(tmp_path / "out"), "--base", str(base)]) == 2
    assert "model.norm.weight differs from what was converted" in capsys.readouterr().err


def test_check_compares_what_is_left(folders, capsys):
    base, run = folders
    assert main(["convert", "check", str(base), str(run)]) == 0
    printed = capsys.readouterr().out
    assert "rows beyond it are padding" in printed
    assert "equal: " in printed


def test_a_smaller_vocabulary_is_refused(tmp_path, capsys):
    """Rows that no checkpoint has must not become zeros."""
    small, large = make(tmp_path / "small", SIZE, True), make(tmp_path / "large", PADDED, True)
    assert main(["convert", "to-megatron", str(small), str(tmp_path / "iter"), "--quiet"]) == 0
    assert main(["convert", "to-hf", str(tmp_path / "iter"), str(tmp_path / "out"), "--base", str(large)]) == 2
    assert f"embedding.word_embeddings.weight has shape ({SIZE}, 48), but the config expects ({PADDED}, 48)" in (
        capsys.readouterr().err
    )


def test_inspect_follows_the_folder(folders, capsys):
    _, run = folders
    assert main(["convert", "inspect", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "Megatron (torch_dist)"
    shutil.rmtree(run / "iter_0000005")
    assert main(["convert", "inspect", str(run), "--json"]) == 2
    assert "names iter_0000005" in capsys.readouterr().err


def test_the_base_may_be_a_name_on_the_hub(folders, tmp_path, monkeypatch):
    base, run = folders
    (base / "tokenizer.json").write_text("{}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    hub_cache.put(tmp_path / "hub", "acme/tiny", base)
    assert main(["convert", "to-hf", str(run), str(tmp_path / "out"), "--base", "acme/tiny", "--quiet"]) == 0
    assert same(weights(tmp_path / "out"), weights(base))
