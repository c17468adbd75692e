"""The messages of a mixture's weights to an engine outside hold each tensor of an export once, to the bit."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.mcore.expert_cases import EXPERTS, fits, make_checkpoints
from tests.mcore.layouts import EXPERT_LAYOUTS, run_worker
from tests.mcore.weight_source_worker import EXPERT_CASES, SIZES
from tests.support.exports import weights

AT = ("ep2", "tp2-ep2-etp1", "tp2-ep2-etp2", "tp2-etp1", "pp2-ep2", "ep2-etp2")


@pytest.fixture(scope="module", params=AT)
def sent(request, tmp_path_factory) -> tuple[str, Path]:
    folder, out = (tmp_path_factory.mktemp(name) for name in ("checkpoints", "out"))
    make_checkpoints(folder)
    run_worker("weight_source_worker", request.param, folder, out)
    return request.param, out


def cases_at(layout: str) -> list[str]:
    return [name for name, case in EXPERT_CASES.items() if fits(case, EXPERT_LAYOUTS[layout])]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_messages_are_the_export(dtype, size, sent):
    layout, out = sent
    for case in cases_at(layout):
        wanted = weights(out / f"{case}-{dtype}-export")
        messages = [load_file(file) for file in sorted((out / f"{case}-{dtype}-{size}").glob("*.st"))]
        assert Counter(name for message in messages for name in message) == Counter(wanted.keys())
        for message in messages:
            for name, tensor in message.items():
                assert tensor.dtype == getattr(torch, dtype)
                assert torch.equal(tensor, wanted[name]), name


@pytest.mark.parametrize("size", SIZES)
def test_a_message_has_all_experts_of_a_layer(size, sent):
    """vLLM fuses them. A message is not larger than its limit, unless it has one module."""
    _, out = sent
    for file in (out / f"full-initial-sgd-float32-{size}").glob("*.st"):
        message = load_file(file)
        layers = {name.partition(".mlp.experts.")[0] for name in message if ".mlp.experts." in name}
        for layer in layers:
            assert sum(name.startswith(f"{layer}.mlp.experts.") for name in message) == 3 * EXPERTS["num_experts"]
        if layers and size == 1:
            assert len(message) == 3 * EXPERTS["num_experts"]


@pytest.mark.parametrize("which", ["first", "all"])
def test_ranks_of_a_replica_have_each_complete_message(which, sent):
    layout, out = sent
    at = EXPERT_LAYOUTS[layout]
    for case in cases_at(layout):
        folder, wanted = out / f"{case}-float32-{which}", weights(out / f"{case}-float32-export")
        for rank in range(at.processes):
            plan, named, _ = json.loads((folder / f"plan-{rank}.json").read_text())
            takes_part = which == "all" or rank % (at.processes // at.pp) < at.tp
            assert named == (plan if takes_part else [[] for _ in plan])
            if takes_part:
                found = load_file(folder / f"{rank}.st")
                assert found.keys() == wanted.keys()
                assert all(torch.equal(found[name], wanted[name]) for name in wanted)
