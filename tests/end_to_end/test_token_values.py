"""Values of single tokens in samples/ at TP 1 and 2, against float64 softmaxes over the logits of `transformers`."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support import forked_ranks

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "examples" / "quickstart"
TEMPERATURE = 1.1  # objective.loss.temperature of the quickstart; rollouts and likeliest tokens have 1
SHORT = (
    *("data.problems_per_step=6", "evaluation.problems=null", "run.tensorboard=false", "run.steps=1"),
    *("run.keep_token_values=4", "run.keep_top_tokens=5", "objective.loss.positions=none"),
    *("megatron.pipeline_model_parallel_size=1", "data.micro_batch_tokens=150"),
)
LAYOUTS = {
    1: ("megatron.tensor_model_parallel_size=1", "megatron.sequence_parallel=false"),
    2: ("megatron.tensor_model_parallel_size=2", "megatron.sequence_parallel=true"),
}


@pytest.fixture(scope="module", params=LAYOUTS)
def samples(request, tmp_path_factory):
    """The samples of one step: student and teacher are still the same model."""
    folder = tmp_path_factory.mktemp(f"tp{request.param}")
    arguments = (f"run.dir={folder / 'run'}", *SHORT, *LAYOUTS[request.param])
    ended = forked_ranks.train(folder, QUICKSTART / "paint.yaml", *arguments, processes=request.param)
    assert ended.statuses == [0] * request.param, ended
    text = (folder / "run" / "samples" / "step_000001.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(QUICKSTART / "model", dtype=torch.float64)


def log_softmax(model, sample, side, temperature):
    """Log-probabilities [tokens, vocabulary] after the prompt of one side."""
    prompt, response = sample[f"{side}_prompt_ids"], sample["response_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    logits = logits.double().numpy() / temperature
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def entropy(log_shares):
    return -(np.exp(log_shares) * log_shares).sum(1)


def test_only_the_first_samples_have_them(samples):
    names = {"divergence", "student_entropy", "teacher_entropy", "logprob_gap", "student_top", "teacher_top"}
    assert [names <= set(sample) for sample in samples] == [True] * 4 + [False] * 2
    assert [bool(names & set(sample)) for sample in samples] == [True] * 4 + [False] * 2


def test_likeliest_tokens(samples, model):
    for sample in samples[:4]:
        for side in ("student", "teacher"):
            shares = np.exp(log_softmax(model, sample, side, 1.0))
            ids = np.argsort(-shares, axis=1)[:, :5]
            found = sample[f"{side}_top"]
            assert found["ids"] == ids.tolist()
            expected = np.take_along_axis(shares, ids, axis=1)
            assert np.allclose(found["probabilities"], expected, rtol=1e-3, atol=1e-7)


def test_entropies_and_divergence(samples, model):
    for sample in samples[:4]:
        student, teacher = (log_softmax(model, sample, side, TEMPERATURE) for side in ("student", "teacher"))
        assert np.allclose(sample["student_entropy"], entropy(student), rtol=1e-3, atol=1e-5)
        assert np.allclose(sample["teacher_entropy"], entropy(teacher), rtol=1e-3, atol=1e-5)
        divergence = (np.exp(teacher) * (teacher - student)).sum(1)  # forward KL
        assert np.allclose(sample["divergence"], divergence, rtol=1e-3, atol=1e-5)
        assert np.abs(sample["logprob_gap"]).max() == pytest.approx(sample["sampler_gap"]["largest"], rel=1e-3)
