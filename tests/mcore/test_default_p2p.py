"""Why the model sets overlap_p2p_comm: Megatron's default mixes up the messages of two stages that have chunks."""

import tempfile
from pathlib import Path

import pytest
import torch
from transformers import Qwen3ForCausalLM

from tests.mcore import parity_cases as parity
from tests.mcore.default_p2p_worker import SECONDS, equal_samples
from tests.mcore.layouts import run_worker
from tests.support import forked_ranks
from tests.support.plain_policy import response_logits

LAYOUT = "pp2-vp2"


@pytest.fixture(scope="module")
def plain(checkpoints) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and gradients of plain torch."""
    model = Qwen3ForCausalLM.from_pretrained(parity.checkpoint(checkpoints, "start", tied=False))
    losses = []
    for sample in equal_samples():
        logits = response_logits(model, sample.student_prompt_ids, sample.response_ids)
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(sample.response_ids), reduction="sum"))
    sum(losses).backward()
    tokens = sum(len(sample.response_ids) for sample in equal_samples())
    return [loss.item() for loss in losses], {name: p.grad / tokens for name, p in model.named_parameters()}


def farthest(found: dict, plain) -> float:
    """The largest relative error of a loss or of a tensor of the gradient."""
    losses, gradients = plain
    assert found["gradients"].keys() == gradients.keys()
    errors = [abs(mine - wanted) / wanted for mine, wanted in zip(found["losses"], losses, strict=True)]
    return max(
        [*errors, *(float((g - gradients[n]).norm() / gradients[n].norm()) for n, g in found["gradients"].items())]
    )


def test_our_setting_is_right(checkpoints, plain, tmp_path):
    run_worker("default_p2p_worker", LAYOUT, checkpoints, tmp_path / "found.pt", "ours")
    found = torch.load(tmp_path / "found.pt")
    assert farthest(found, plain) < 1e-5
    assert found["marks"] == len(equal_samples())  # the heartbeat, once for each micro-batch of one sample


def test_megatrons_default_is_wrong(checkpoints, plain, tmp_path):
    """Its numbers are wrong without an error, or an error or a hang of the pass shows it."""
    found = tmp_path / "found.pt"
    with tempfile.TemporaryDirectory() as printed:
        target = "tests.mcore.default_p2p_worker:main"
        arguments = (LAYOUT, checkpoints, found, "default")
        ended = forked_ranks.run(Path(printed), *arguments, target=target, processes=2, limit=3 * SECONDS)
    assert all((tmp_path / f"begun{rank}").exists() for rank in range(2)), ended.err
    assert any(ended.statuses) or farthest(torch.load(found), plain) > 0.1
