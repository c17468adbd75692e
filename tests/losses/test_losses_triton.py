"""The Triton kernels: under the interpreter against float64, compiled for a GPU, and when they are chosen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from megatron_paint.base.errors import UserError
from megatron_paint.losses.elementwise.choose import _warn_once, choose_kernel, loss_kernel
from tests.losses.losses_cases import LOGPROB_CASES, TRITON_CASES, options

pytest.importorskip("triton", reason="Triton is not installed")

HERE = Path(__file__).parent
SUPPORTED = [name for name in options(clip=0.05) if name != "reverse"]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
OPTIONS = options(clip=0.05)
SHARDED = (
    "forward-padded",
    "forward-skewed",
    "forward",
    "cold",
    "clipped-cut-skip",
    "jsd-cut-full-teacher",
    "forward-support-cut-student-partner-initial",
    "jsd-support-padded",
)
# `make test` leaves out what other cases contain in another combination.
LONG = (
    *("clipped-cut-full-teacher", "clipped-cut-skip", "clipped-padded", "forward-support", "forward-token-clip"),
    *("jsd-high", "jsd-support-cut-full-teacher", "jsd-token-clip", "reverse-cut-most", "reverse-token-clip"),
)


def _runs(short: list[str], more: list[str] = ()) -> pytest.MarkDecorator:
    """Parametrizes a test of what the interpreter's process measures; `make test` leaves out `more`."""
    return pytest.mark.parametrize("run", [*short, *(pytest.param(run, marks=pytest.mark.long) for run in more)])


def _sizes(kind: str, names: Sequence[str]) -> pytest.MarkDecorator:
    """Every case once with few tokens, and once with all."""
    short = {name: f"{kind} {name} short" for name in names}
    more = [short[name] for name in names if name in LONG]
    return _runs(
        [short[name] for name in names if name not in LONG], [*more, *(f"{kind} {name} full" for name in names)]
    )


def _run(*arguments: str, **environment: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | environment
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parents[1]), str(HERE)])
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def found(request, tmp_path_factory):
    """What the interpreter's process measured in the runs that are selected."""
    folder = tmp_path_factory.mktemp("triton")
    items = [item for item in request.session.items if item.path == Path(__file__)]
    runs = [item.callspec.params["run"] for item in items if "found" in item.fixturenames]
    (folder / "runs.json").write_text(json.dumps(runs))
    _run(str(HERE / "triton_worker.py"), str(folder / "runs.json"), str(folder / "found.json"), TRITON_INTERPRET="1")
    return json.loads((folder / "found.json").read_text())


@_sizes("loss", TRITON_CASES)
def test_fused_loss_equals_dense(found, run):
    """Values and gradients in float32; selections and counts exactly."""
    exact = ("selected_T", "clipped_entries_T", "carries_loss_T")
    errors = found[run]
    assert not {key: value for key, value in errors.items() if value > (0.0 if key.endswith(exact) else 5e-6)}


@_sizes("logprobs", LOGPROB_CASES)
def test_token_logprobs_equal_dense(found, run):
    """Log-probabilities, entropies and gradients in float32."""
    errors = found[run]
    assert len(errors) == 8
    assert not {key: value for key, value in errors.items() if value > 5e-6}


@_runs(
    [f"kernels float32 {divergence} {columns}" for divergence in OPTIONS for columns in (1, 16, 37)]
    + [
        f"kernels {kind} {divergence} 37"
        for kind in ("bfloat16", "masked", "extreme", "identical")
        for divergence in OPTIONS
    ]
    + [f"kernels support {divergence} {columns}" for divergence in SUPPORTED for columns in (1, 37)],
    [f"kernels float16 {divergence} 37" for divergence in OPTIONS],
)
def test_kernels_equal_float64(found, run):
    """On the same logits in float64: any width, any type, masked columns, logits of 1e4, a teacher that is the student.

    The bfloat16 runs write their gradient rounded to 8 bits. At 1e4 float32 logits have steps of 1e-3.
    """
    kind, errors = run.split()[1], found[run]
    assert errors["finite"] == 1.0
    assert max(errors[name] for name in ("normalisers", "token", "outcome")) <= 5e-6
    if kind == "identical":
        assert errors["loss"] == errors["largest"] == 0.0
    elif kind != "extreme":
        assert errors["gradient"] <= (4e-3 if kind == "bfloat16" else 5e-6)


@_runs(
    [
        f"tokens {logits} {gradient} {columns}"
        for logits in ("float32", "bfloat16", "float16")
        for gradient in ("float32", "bfloat16")
        for columns in (1, 16, 37)
    ]
)
def test_token_kernels_equal_float64(found, run):
    """Of all types, the gradient in a separate buffer where the types differ; one token on another rank."""
    assert found[run]["statistics"] <= 5e-6
    assert found[run]["gradient"] <= (5e-6 if run.split()[2] == "float32" else 4e-3)


@_runs(
    [f"broken torch {value} each" for value in ("nan", "inf", "-inf")]
    + ["broken triton nan each", "broken triton inf forward", "broken triton -inf forward"],
    ["broken triton inf each", "broken triton -inf each"],
)
def test_what_is_not_finite_stays_so(found, run):
    """One broken hidden state: its row's loss is not finite, whatever the divergence and whoever's it is."""
    assert len(found[run]) == 3 * (len(OPTIONS) if run.endswith("each") else 1) + 1
    assert {name: rows for name, rows in found[run].items() if rows != [True, False, True, True]} == {}


@_sizes("sharded", SHARDED)
def test_sharded_vocabularies_equal_dense(found, run):
    """Two ranks, one of them with padding, unequal shards, tokens elsewhere."""
    assert found[run] <= 5e-6


def test_kernels_compile_for_hopper():
    """Triton's compiler needs no GPU: what the interpreter forgives, it does not."""
    _run(str(HERE / "triton_compile.py"))


def test_choice_of_kernel(monkeypatch):
    """auto is Triton on CUDA and torch elsewhere; float64 is torch's; an interpreter makes triton run on a CPU."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    _warn_once.cache_clear()
    with pytest.warns(UserWarning, match="these tensors are on cpu") as caught:
        chosen = [choose_kernel("auto", device=CPU, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    assert chosen == ["torch", "torch"]
    assert len(caught) == 1
    assert choose_kernel("auto", device=CUDA, dtype=torch.float32) == "triton"
    assert choose_kernel("triton", device=CUDA, dtype=torch.float32) == "triton"
    assert choose_kernel("torch", device=CUDA, dtype=torch.float32) == "torch"
    assert choose_kernel("triton", device=CUDA, dtype=torch.float64) == "torch"
    with pytest.raises(ValueError, match="kernel: got 'triton'; it needs CUDA and Triton"):
        choose_kernel("triton", device=CPU, dtype=torch.float32)
    with pytest.raises(ValueError, match="kernel: got 'cuda'"):
        choose_kernel("cuda", device=CPU, dtype=torch.float32)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose_kernel("triton", device=CPU, dtype=torch.float32) == "triton"
    monkeypatch.setattr("megatron_paint.losses.elementwise.choose.find_spec", lambda _: None)
    _warn_once.cache_clear()
    with pytest.warns(UserWarning, match="Triton is not installed"):
        assert choose_kernel("auto", device=CUDA, dtype=torch.float32) == "torch"
    with pytest.raises(ValueError, match="Triton is not installed"):
        choose_kernel("triton", device=CUDA, dtype=torch.float32)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(
        UserError, match=r"objective\.kernel: got 'triton'; it needs CUDA and Triton, and Triton is not"
    ):
        loss_kernel("triton")
    assert loss_kernel("auto") == "torch"
    monkeypatch.undo()
    assert (loss_kernel("auto"), loss_kernel("torch")) == ("triton" if torch.cuda.is_available() else "torch", "torch")
