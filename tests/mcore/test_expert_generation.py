"""Rollouts of a mixture of experts: replicas that share experts sample in lock-step, and the tokens stay the same."""

import pytest
import torch
from transformers import Qwen3MoeForCausalLM

from tests.mcore import parity_cases as parity
from tests.mcore.expert_cases import make_checkpoints
from tests.mcore.generation_cases import BATCHES, SAMPLING, STOP, requests
from tests.mcore.layouts import EXPERT_LAYOUTS, run_worker


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_checkpoints(folder)
    return parity.checkpoint(folder, "start", tied=True, experts=True)


@pytest.fixture(scope="module")
def rollouts(model_folder, tmp_path_factory):
    """Rollouts of all cases at a layout."""
    made = {}

    def of(layout: str):
        if layout not in made:
            out = tmp_path_factory.mktemp(layout) / "rollouts.pt"
            run_worker("generation_worker", layout, model_folder, out)
            made[layout] = torch.load(out, weights_only=False)
        return made[layout]

    return of


@pytest.fixture(scope="module")
def wanted_greedy(model_folder):
    """Greedy responses of `transformers`, one per request."""
    torch.set_num_threads(1)
    model = Qwen3MoeForCausalLM.from_pretrained(model_folder)
    answers = []
    for request in requests():
        prompt, limit = torch.tensor([request.prompt_ids]), SAMPLING["greedy"].max_new_tokens
        ids = model.generate(prompt, max_new_tokens=limit, do_sample=False, eos_token_id=STOP, pad_token_id=STOP)
        answers.append(tuple(ids[0, prompt.size(1) :].tolist()))
    return answers


@pytest.mark.parametrize("layout", EXPERT_LAYOUTS)
def test_greedy_equals_transformers(layout, rollouts, wanted_greedy):
    for batch in BATCHES:
        assert [rollout.response_ids for rollout in rollouts(layout)[f"greedy-{batch}"]] == wanted_greedy


@pytest.mark.parametrize("layout", EXPERT_LAYOUTS)
@pytest.mark.parametrize("case", SAMPLING)
def test_same_at_every_layout_and_batch(layout, case, rollouts):
    wanted = rollouts("experts-tp1")[f"{case}-64"]
    for batch in BATCHES:
        found = rollouts(layout)[f"{case}-{batch}"]
        assert [r.response_ids for r in found] == [r.response_ids for r in wanted]
        for one, other in zip(found, wanted, strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=2e-5)


@pytest.mark.parametrize("layout", EXPERT_LAYOUTS)
def test_one_request_alone(layout, rollouts):
    """All replicas except one have nothing to sample."""
    (alone,), together = rollouts(layout)["alone-64"], rollouts(layout)["plain-64"]
    assert alone.response_ids == together[2].response_ids


def test_replicas_have_different_work(rollouts):
    """Otherwise the lock-step would not be tested: responses differ in length."""
    assert len({len(r.response_ids) for r in rollouts("experts-tp1")["plain-64"]}) > 2
