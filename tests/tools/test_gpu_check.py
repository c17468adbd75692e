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


def test_a_file_that_cannot_be_written_is_told_before_the_parts(tmp_path):
    out = tmp_path / "no" / "found.json"
    status, said, _ = check(tmp_path, "--parts", "versions", "--out", str(out))
    assert status == 2
    assert said.endswith(f"error: --out={out} cannot be written (No such file or directory)\n")


def test_an_interrupt_ends_the_part(monkeypatch, tmp_path):
    """Ctrl-C does not reach the part, because it runs in another session."""
    part = tmp_path / "gpu_check.py"
    part.write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(gpu_check, "__file__", str(part))
    started = []

    class Interrupted(subprocess.Popen):
        def communicate(self, *args, **kwargs):
            started.append(self)
            raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        gpu_check.run_part("versions", tiny=True, limit=30.0)
    assert started[0].wait(timeout=10) == -9


def test_a_variant_of_the_loss_that_crashes_costs_only_itself(monkeypatch):
    def run(command, **_):
        variant = command[command.index("--variants") + 1]
        if variant == "gemms":
            Path(command[-1]).write_text('[{"variant": "gemms"}]')
        return subprocess.CompletedProcess(command, int(variant != "gemms"), "", "no kernel image")

    monkeypatch.setattr(subprocess, "run", run)
    gemms, fused = gpu_check.loss(gpu_check.SMALL)["rows"]
    assert gemms == {"variant": "gemms"}
    assert fused == {"variant": "fused", "error": "benchmarks/loss.py ended with status 1: no kernel image"}
    monkeypatch.setattr(gpu_check, "measured_loss", lambda variant, sizes: {"variant": variant, "error": "all"})
    with pytest.raises(RuntimeError, match="all"):
        gpu_check.loss(gpu_check.SMALL)


def test_tests_that_are_all_skipped_did_not_pass(monkeypatch):
    def run(command, **_):
        (report,) = [word.partition("=")[2] for word in command if word.startswith("--junitxml=")]
        Path(report).write_text('<testsuites><testsuite tests="3" skipped="3" failures="0" errors="0"/></testsuites>')

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(gpu_check.Skipped, match="pytest skipped all 3 tests"):
        gpu_check.tests(gpu_check.SMALL)


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
