"""A mixture of experts through the command line: train, evaluate, resume at another layout, export."""

import json

import pytest
import torch
from transformers import Qwen3MoeForCausalLM

from tests.support import forked_ranks, tiny
from tests.support.exports import weights_of_step
from tests.support.results import metrics

SIZES = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
EP2 = ("megatron.expert_model_parallel_size=2",)
TP2 = ("megatron.tensor_model_parallel_size=2", "megatron.sequence_parallel=true")
TP2 += ("megatron.expert_tensor_parallel_size=1",)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folders of an unbroken run of four steps and of one that resumed after two at another layout."""
    folder = tmp_path_factory.mktemp("runs")
    model = tiny.make_model(folder / "model", **SIZES)
    settings = tiny.make_settings(folder, model, tiny.make_problems(folder / "problems.jsonl"))
    train(folder, settings, f"run.dir={folder / 'unbroken'}", *EP2)
    train(folder, settings, f"run.dir={folder / 'resumed'}", "run.steps=2", *EP2)
    train(folder, settings, f"run.dir={folder / 'resumed'}", "run.resume=auto", *TP2)
    return folder / "unbroken", folder / "resumed"


def train(folder, settings, *overrides) -> None:
    ended = forked_ranks.train(folder, settings, *overrides)
    assert ended.statuses == [0, 0], ended


def test_what_a_run_logs(runs):
    lines = metrics(runs[0])
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert line["sampler_gap/max"] < 1e-4
        assert 1 <= line["experts/imbalance"] <= 4
        assert line["experts/tokens_mean"] <= line["experts/tokens_max"]
        assert 0 <= line["experts/idle_share"] < 0.5
        assert 0 < line["router/entropy_mean"] < 1.387  # the logarithm of 4 is 1.386
        assert line["grad_norm"] > 0


def test_a_run_resumes_at_another_layout(runs):
    unbroken, resumed = (metrics(run) for run in runs)
    for one, other in zip(unbroken, resumed, strict=True):
        for key in ("loss", "grad_norm", "router/entropy_mean"):
            assert one[key] == pytest.approx(other[key], rel=1e-3), (one["step"], key)


def test_evaluations_are_the_same(runs):
    """At step 4 one is sampled in lock-step by two replicas, the other by one."""
    unbroken, resumed = (json.loads((run / "eval" / "step_000004.json").read_text()) for run in runs)
    assert unbroken["answers"]
    assert [a["response_text"] for a in unbroken["answers"]] == [a["response_text"] for a in resumed["answers"]]


def test_the_export_is_a_mixture_of_transformers(runs):
    folder = runs[0] / "hf" / "step_000004"
    model = Qwen3MoeForCausalLM.from_pretrained(folder)
    assert model.config.num_experts == SIZES["num_experts"]
    stored = weights_of_step(runs[0], 4)
    layer = model.model.layers[1].mlp
    gate, up = layer.experts.gate_up_proj[3].chunk(2)
    assert torch.equal(gate, stored["model.layers.1.mlp.experts.3.gate_proj.weight"])
    assert torch.equal(up, stored["model.layers.1.mlp.experts.3.up_proj.weight"])
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "qwen3_moe"
