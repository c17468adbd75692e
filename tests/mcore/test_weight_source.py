"""The messages to an engine outside hold, over all ranks, each tensor of an export once, to the bit."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.mcore import parity_cases as parity
from tests.mcore.layouts import layout_of, run_worker
from tests.mcore.weight_source_worker import CASES, SIZES
from tests.support.exports import weights

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@pytest.fixture(scope="module", params=["tp1", "pp2", "tp2-pp2-sp", "tp2-dp2", "tp2-cp2-sp", "pp2-vp2"])
def sent(request, tmp_path_factory) -> tuple[str, Path]:
    folder, out = (tmp_path_factory.mktemp(name) for name in ("checkpoints", "out"))
    parity.make_checkpoints(folder)
    run_worker("weight_source_worker", request.param, folder, out)
    return request.param, out


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_the_messages_are_the_export(case, dtype, size, sent):
    _, out = sent
    wanted = weights(out / f"{case}-{dtype}-export")
    if CASES[case].tied:
        wanted[HEAD] = wanted[EMBEDDING]  # a server may have a copy of its own
    messages = [load_file(file) for file in sorted((out / f"{case}-{dtype}-{size}").glob("*.st"))]
    assert Counter(name for message in messages for name in message) == Counter(wanted.keys())
    for message in messages:
        for name, tensor in message.items():
            assert tensor.dtype == getattr(torch, dtype)
            assert torch.equal(tensor, wanted[name]), name
    shapes = json.loads((out / f"{case}-{dtype}-{size}" / "plan-0.json").read_text())[1]
    assert shapes == {name: list(tensor.shape) for name, tensor in wanted.items()}


@pytest.mark.parametrize("size", SIZES)
def test_a_message_has_complete_modules_up_to_its_size(size, sent):
    layout, out = sent
    for file in (out / f"full-initial-sgd-float32-{size}").glob("*.st"):
        message = load_file(file)
        for parts in FUSED:
            layers = {name.rpartition(f".{part}.")[0] for name in message for part in parts if f".{part}." in name}
            for layer in layers:
                assert all(f"{layer}.{part}.weight" in message for part in parts)
        total = sum(tensor.nbytes for tensor in message.values())
        assert total <= size or len({module_of(name) for name in message}) == 1
    count = len(list((out / f"full-initial-sgd-float32-{size}").glob("*.st")))
    if size == SIZES[-1]:
        assert count == layout_of(layout).pp
    else:
        assert count > layout_of(layout).pp


def module_of(name: str) -> str:
    for number, parts in enumerate(FUSED):
        for part in parts:
            name = name.replace(part, f"fused{number}")
    return name


def test_ranks_share_the_writing(sent):
    layout, out = sent
    writers = {file.name.partition("-")[0] for file in (out / "full-initial-sgd-float32-20000").glob("*.st")}
    assert len(writers) == layout_of(layout).tp * layout_of(layout).pp


@pytest.mark.parametrize("which", ["first", "all"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_ranks_of_a_replica_have_each_complete_message(case, dtype, which, sent):
    """For transfers between GPUs: on the ranks of the first replica, or of all of them; a tied head is no tensor."""
    layout, out = sent
    folder, wanted = out / f"{case}-{dtype}-{which}", weights(out / f"{case}-{dtype}-export")
    plans = []
    for rank in range(layout_of(layout).processes):
        plan, named, shapes = json.loads((folder / f"plan-{rank}.json").read_text())
        plans.append(plan)
        assert shapes == {name: list(tensor.shape) for name, tensor in wanted.items()}
        takes_part = which == "all" or rank < layout_of(layout).tp or layout_of(layout).copies == 1
        assert named == (plan if takes_part else [[] for _ in plan])
        assert (folder / f"{rank}.st").exists() == takes_part
        if takes_part:
            found = load_file(folder / f"{rank}.st")
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[name], wanted[name]) for name in wanted)
            assert all(tensor.dtype == getattr(torch, dtype) for tensor in found.values())
    assert all(plan == plans[0] for plan in plans)
    assert len(plans[0]) > layout_of(layout).pp
    assert sorted(name for message in plans[0] for name in message) == sorted(wanted)


def test_weights_that_are_not_finite_are_not_sent(sent):
    layout, out = sent
    told = [(out / f"told-{rank}").read_text() for rank in range(layout_of(layout).processes)]
    (message,) = [text for text in told if text]
    assert re.match(r"decoder\.layers\.\d\.self_attention\.linear_proj\.weight is not finite: ", message)
