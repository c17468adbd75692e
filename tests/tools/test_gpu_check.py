"""The check of a GPU, with tiny sizes on a CPU: what it writes, and that a part costs only itself."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3Config, Qwen3ForCausalLM

from megatron_paint.models.qwen3.shape import read_shape
from tools import gpu_check

ROOT = Path(__file__).parents[2]


def check(folder: Path, *arguments: str) -> tuple[int, str, dict]:
    command = [sys.executable, ROOT / "tools" / "gpu_check.py", "--tiny", "--out", folder / "found.json", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    file = folder / "found.json"
    return ended.returncode, ended.stdout + ended.stderr, json.loads(file.read_text()) if file.exists() else {}


def test_a_part_that_needs_a_gpu_is_skipped(tmp_path):
    status, out, found = check(tmp_path, "--parts", "versions,engine")
    assert status == 0, out
    assert [one["status"] for one in found.values()] == ["passed", "passed" if torch.cuda.is_available() else "skipped"]
    assert found["versions"]["result"]["torch"] == torch.__version__
    if not torch.cuda.is_available():
        assert found["engine"]["message"] == "no CUDA device was found"


def test_a_part_that_hangs_costs_only_itself(tmp_path, monkeypatch):
    monkeypatch.setitem(gpu_check.PARTS, "step", (1, gpu_check.step))
    monkeypatch.setattr(sys, "argv", ["", "--tiny", "--out", str(tmp_path / "found.json"), "--parts", "step,versions"])
    assert gpu_check.main() == 1
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["step"]["status"] == "failed"
    assert found["step"]["message"] == "it took more than 1 s"
    assert found["versions"]["status"] == "passed"


def test_a_part_that_crashes_is_told(monkeypatch, tmp_path):
    broken = tmp_path / "gpu_check.py"
    broken.write_text("import os, sys\nprint('last words', file=sys.stderr)\nos.abort()\n")
    monkeypatch.setattr(gpu_check, "__file__", str(broken))
    found = gpu_check.run_part("versions", tiny=True, limit=30.0)
    assert found["status"] == "failed"
    assert found["message"].startswith("status -6: last words")


def test_an_unknown_part_is_refused(tmp_path):
    status, out, found = check(tmp_path, "--parts", "versions,engines")
    assert (status, found) == (2, {})
    assert "--parts has 'engines'; known are versions, engine, tests, " in out


@pytest.mark.long
def test_all_parts_with_tiny_sizes(tmp_path):
    status, out, found = check(tmp_path)
    assert status == 0, out
    assert list(found) == list(gpu_check.PARTS)
    step = found["step"]["result"]
    assert step["paint"]["seconds"] > 0
    assert step["paint_over_sft"] == pytest.approx(step["paint"]["seconds"] / step["sft"]["seconds"])
    assert found["sampling"]["result"]["tokens_a_second"] > 0
    assert {row["variant"] for row in found["loss"]["result"]["rows"]} == {"gemms", "fused"}


def test_operations_of_a_step(tmp_path):
    """Products of the body and the output layer are those that torch counts in a forward pass of `transformers`."""
    gpu_check.write_model(tmp_path, gpu_check.TINY)
    shape, sizes = read_shape(tmp_path), gpu_check.SMALL
    model = Qwen3ForCausalLM(Qwen3Config(**gpu_check.TINY, tie_word_embeddings=False))
    tokens = sizes.prompt + sizes.response
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, tokens, dtype=torch.int64), logits_to_keep=sizes.response)
    counts = counter.get_flop_counts()["Global"]
    products = sum(count for operation, count in counts.items() if "attention" not in str(operation))
    table = shape.vocab_size * shape.hidden_size
    attention = 2 * 2 * (4 * 16) * tokens * tokens  # layers, two products of 2 n^2 x heads x head size, causal: half
    output = 2 * table * sizes.response
    wanted = sizes.samples * (3 * (products - output + attention) + 3 * output)
    # Norms of queries and keys are weights, and no products.
    assert gpu_check.flop_of(shape, sizes, teaches=False) == pytest.approx(wanted, rel=5e-3)
