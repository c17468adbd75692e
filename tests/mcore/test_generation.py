"""Rollouts in process: greedy ones equal `transformers.generate`, sampled ones are the same at every layout."""

from functools import cache

import pytest
import torch
from transformers import Qwen3ForCausalLM

from tests.mcore import parity_cases as parity
from tests.mcore.generation_cases import BATCHES, SAMPLING, STOP, requests
from tests.mcore.layouts import LAYOUTS as ALL
from tests.mcore.layouts import PIPELINES, run_worker

# Sampling divides no row: with context parallelism, each copy of the weights samples alone. One such layout is enough.
LAYOUTS = [name for name in ALL if "cp2" not in name or name == "cp2-dp2"]


@pytest.fixture(scope="module")
def model_folder(checkpoints):
    return parity.checkpoint(checkpoints, "start", tied=True)


@pytest.fixture(scope="module")
def yarn_folder(checkpoints):
    return parity.checkpoint(checkpoints, "start", tied=True, yarn=True)


@pytest.fixture(scope="module")
def rollouts(model_folder, tmp_path_factory):
    """Rollouts of all cases at a layout."""
    return cache(lambda layout: sampled(layout, model_folder, tmp_path_factory))


@pytest.fixture(scope="module", params=["tp1", pytest.param("tp2-pp2-sp", marks=pytest.mark.long)])
def yarn_rollouts(request, yarn_folder, tmp_path_factory):
    """Rollouts of a model with YaRN."""
    return sampled(request.param, yarn_folder, tmp_path_factory)


def sampled(layout, folder, tmp_path_factory):
    out = tmp_path_factory.mktemp(layout) / "rollouts.pt"
    run_worker("generation_worker", layout, folder, out)
    return torch.load(out, weights_only=False)


@pytest.fixture(scope="module")
def wanted_greedy(model_folder):
    return greedy_of_transformers(model_folder)


def greedy_of_transformers(model_folder):
    """Greedy responses, one per request."""
    torch.set_num_threads(1)
    model = Qwen3ForCausalLM.from_pretrained(model_folder)
    answers = []
    for request in requests():
        prompt = torch.tensor([request.prompt_ids])
        limit = SAMPLING["greedy"].max_new_tokens
        ids = model.generate(prompt, max_new_tokens=limit, do_sample=False, eos_token_id=STOP, pad_token_id=STOP)
        answers.append(tuple(ids[0, prompt.size(1) :].tolist()))
    return answers


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", BATCHES)
def test_greedy_equals_transformers(layout, batch, rollouts, wanted_greedy):
    for wanted, rollout in zip(wanted_greedy, rollouts(layout)[f"greedy-{batch}"], strict=True):
        assert rollout.response_ids == wanted
        assert rollout.finished == (rollout.response_ids[-1] == STOP)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", SAMPLING)
def test_same_at_every_layout_and_batch(layout, case, rollouts):
    wanted = rollouts("tp1")[f"{case}-64"]
    for batch in BATCHES:
        found = rollouts(layout)[f"{case}-{batch}"]
        assert [r.response_ids for r in found] == [r.response_ids for r in wanted]
        assert [r.problem_id for r in found] == [r.problem_id for r in requests()]
        for one, other in zip(found, wanted, strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=2e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_independent_of_the_batch(layout, rollouts):
    alone, together = rollouts(layout)["alone-64"][0], rollouts(layout)["plain-64"][2]
    assert alone.response_ids == together.response_ids


@pytest.mark.parametrize("case", ["plain", "nucleus", "top-k"])
def test_logprobs_are_the_models(case, rollouts, model_folder):
    check_logprobs(rollouts("tp1")[f"{case}-64"], SAMPLING[case], model_folder, atol=2e-5)


def test_with_yarn(yarn_rollouts, yarn_folder):
    wanted = greedy_of_transformers(yarn_folder)
    for batch in BATCHES:
        assert [rollout.response_ids for rollout in yarn_rollouts[f"greedy-{batch}"]] == wanted
        for case in ("plain", "nucleus", "top-k"):
            check_logprobs(yarn_rollouts[f"{case}-{batch}"], SAMPLING[case], yarn_folder, atol=1e-5)


@pytest.fixture(scope="module")
def on_one_rank(checkpoints, tmp_path_factory):
    """For a number of layers: the model, its rollouts on one rank, transformers' greedy responses."""

    def of(layers: int):
        folder = parity.checkpoint(checkpoints, "start", tied=True, layers=layers)
        return folder, sampled("tp1", folder, tmp_path_factory), greedy_of_transformers(folder)

    return cache(of)


@pytest.mark.parametrize("layout", PIPELINES)
def test_chunks_and_uneven_stages_sample_the_same(layout, on_one_rank, tmp_path_factory):
    folder, wanted, greedy = on_one_rank(PIPELINES[layout].layers)
    found = sampled(layout, folder, tmp_path_factory)
    for batch in BATCHES:
        assert [rollout.response_ids for rollout in found[f"greedy-{batch}"]] == greedy
    assert found.keys() == wanted.keys()
    for name, rollouts in found.items():
        assert [r.response_ids for r in rollouts] == [r.response_ids for r in wanted[name]]
        for one, other in zip(rollouts, wanted[name], strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=2e-5)


def check_logprobs(rollouts, sampling, model_folder, *, atol):
    """Of `transformers`, at the sampling temperature, over the complete vocabulary, before top-k and top-p."""
    model = Qwen3ForCausalLM.from_pretrained(model_folder)
    for rollout in rollouts:
        ids = torch.tensor([[*rollout.prompt_ids, *rollout.response_ids]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(rollout.prompt_ids) - 1 : -1]
        logp = (logits / sampling.temperature).log_softmax(-1)
        wanted = logp.gather(1, torch.tensor(rollout.response_ids)[:, None])[:, 0]
        assert rollout.logprobs == pytest.approx(wanted.tolist(), abs=atol)


def test_responses_differ_and_stop(rollouts):
    """The cases are worth something: draws differ between keys, some rows stop early, some run to the limit."""
    found = rollouts("tp1")["plain-64"]
    assert len({r.response_ids for r in found}) == len(found)
    lengths = {len(r.response_ids) for case in SAMPLING for r in rollouts("tp1")[f"{case}-64"]}
    assert len(lengths) > 2
    assert {r.finished for case in SAMPLING for r in rollouts("tp1")[f"{case}-64"]} == {True, False}
