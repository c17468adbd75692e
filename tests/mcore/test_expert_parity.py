"""A mixture of experts at every layout against plain torch over `transformers`' Qwen3-MoE."""

from functools import cache

import pytest
import torch
from transformers import Qwen3MoeForCausalLM

from tests.mcore import parity_cases as parity
from tests.mcore.expert_cases import CASES, EXPERTS, fits, make_checkpoints
from tests.mcore.layouts import EXPERT_LAYOUTS, run_worker
from tests.mcore.plain_runs import assert_equals_plain, plain_run

NAMED = {case.name: case for case in CASES}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    make_checkpoints(folder)
    return folder


@pytest.fixture(scope="module")
def plain(checkpoints):
    """Results of plain torch for the name of a case, computed once."""
    torch.set_num_threads(1)
    return cache(lambda name: plain_run(NAMED[name], checkpoints))


@pytest.fixture(scope="module")
def outputs(checkpoints, tmp_path_factory):
    """Output folder of a layout: one process group runs all its cases."""

    def of(layout: str):
        out = tmp_path_factory.mktemp(layout)
        run_worker("expert_worker", layout, checkpoints, out)
        return out

    return cache(of)


FITTING = [
    pytest.param(layout, name, id=f"{layout}-{name}")
    for layout, at in EXPERT_LAYOUTS.items()
    for name, case in NAMED.items()
    if fits(case, at)
]


@pytest.mark.parametrize(("layout", "name"), FITTING)
def test_equals_plain_torch(layout, name, outputs, plain):
    assert_equals_plain(NAMED[name], outputs(layout), plain(name))


def test_routing_is_that_of_transformers(outputs, checkpoints):
    """One process pads nothing, so its routers see the prompts and responses of the step alone."""
    found = torch.load(outputs("experts-tp1") / "sft-sgd.pt")["metrics"][0]
    model = Qwen3MoeForCausalLM.from_pretrained(NAMED["sft-sgd"].checkpoint(checkpoints, "moved"))
    rows = [torch.tensor([[*prompt, *response[:-1]]]) for prompt, *_, response in parity.step_samples(0)]
    with torch.no_grad():
        routed = [model(input_ids=row, output_router_logits=True).router_logits for row in rows]
    layers = [torch.cat([row.flatten(0, -2) for row in parts]) for parts in zip(*routed, strict=True)]
    chosen = [logits.topk(EXPERTS["num_experts_per_tok"], -1).indices.flatten() for logits in layers]
    tokens = torch.stack([torch.bincount(indices, minlength=EXPERTS["num_experts"]) for indices in chosen]).double()
    entropy = torch.stack([torch.distributions.Categorical(logits=logits).entropy() for logits in layers])
    wanted = {
        "experts/tokens_mean": len(chosen[0]) / EXPERTS["num_experts"],
        "experts/tokens_max": float(tokens.max()),
        "experts/imbalance": float((tokens.amax(1) / tokens.mean(1)).mean()),
        "experts/idle_share": float((tokens == 0).double().mean()),
        "router/entropy_mean": float(entropy.mean()),
    }
    assert found == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("layout", ["tp2-ep2-etp1"])
def test_routing_is_counted_over_all_ranks(layout, outputs):
    """Padding of a micro-batch is counted too, so tokens may be more, but no rank's are missing."""
    alone, together = (torch.load(outputs(at) / "sft-sgd.pt")["metrics"][0] for at in ("experts-tp1", layout))
    assert alone["experts/tokens_mean"] <= together["experts/tokens_mean"] < 1.2 * alone["experts/tokens_mean"]
    assert together["router/entropy_mean"] == pytest.approx(alone["router/entropy_mean"], rel=0.05)
