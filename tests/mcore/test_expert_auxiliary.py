"""The losses of a mixture's routers have the weight that their settings state: against plain torch over `transformers`.

Each is a mean over all tokens of the step, padding included. The tokens of a micro-batch count together for the load of
its experts, on whichever ranks they are.
"""

from importlib.metadata import version

import pytest
import torch
from torch import Tensor
from transformers import Qwen3MoeForCausalLM

from tests.mcore import parity_cases as parity
from tests.mcore.expert_auxiliary_worker import COEFFICIENT
from tests.mcore.expert_cases import EXPERTS, make_checkpoints
from tests.mcore.layouts import run_worker
from tests.mcore.plain_runs import by_expert, relative

pytestmark = pytest.mark.skipif(
    tuple(map(int, version("megatron-core").split(".")[:2])) < (0, 19),
    reason="megatron-core before 0.19 has no hook for the scale of these losses, and the plan refuses them",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    make_checkpoints(folder)
    return folder


LAYOUTS = (
    *("experts-tp1", "ep2", "tp2-ep2-etp1", "pp2-ep2"),
    *("pp2-vp2", "pp2-vp2-ep2"),
    *("cp2", "cp2-ep2", "tp2-cp2-sp", "tp2-cp2-ep2-etp2", "pp2-vp2-cp2-ep2"),
)


@pytest.fixture(scope="module", params=LAYOUTS)
def found(request, folder, tmp_path_factory):
    out = tmp_path_factory.mktemp(request.param)
    run_worker("expert_auxiliary_worker", request.param, folder, out)
    return torch.load(out / "found.pt")


def of_layer(kind: str, logits_TE: Tensor) -> Tensor:
    """The loss of one layer and micro-batch (Switch Transformer, arXiv 2101.03961; ST-MoE, arXiv 2202.08906)."""
    if kind == "z":
        return torch.logsumexp(logits_TE, -1).square().mean()
    experts = logits_TE.size(1)
    chosen = logits_TE.topk(EXPERTS["num_experts_per_tok"], -1).indices
    load_E = torch.bincount(chosen.flatten(), minlength=experts) / chosen.numel()
    return experts * (logits_TE.softmax(-1).mean(0) * load_E).sum()


def reference(folder, batches, kind: str) -> dict[str, Tensor]:
    """Gradients of the loss, mean over the tokens of all micro-batches, padding included."""
    model = Qwen3MoeForCausalLM.from_pretrained(parity.checkpoint(folder, "start", tied=False, experts=True)).train()
    total = sum(len(ids) for ids, _ in batches)
    for ids, lengths in batches:
        rows = torch.tensor(ids).split(lengths)
        per_row = [model(input_ids=row[None], output_router_logits=True).router_logits for row in rows]
        layers = [torch.cat([row.flatten(0, -2) for row in parts]) for parts in zip(*per_row, strict=True)]
        loss = sum(of_layer(kind, logits_TE) for logits_TE in layers)
        (COEFFICIENT * loss * len(ids) / total).backward()
    return by_expert({name: p.grad for name, p in model.named_parameters() if p.grad is not None})


@pytest.mark.parametrize("kind", ["aux", "z"])
def test_the_weight_is_that_of_the_settings(kind, found, folder):
    wanted = reference(folder, found["batches"], kind)
    assert wanted.keys() < found["none"].keys()
    for name, gradient in found["none"].items():
        change = found[kind][name] - gradient
        assert relative(change, wanted.get(name, torch.zeros_like(change))) < 1e-5, name
