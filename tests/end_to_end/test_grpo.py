"""Runs with GRPO through the command line: what is logged, going on bit for bit, and groups that teach nothing."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_paint.mcore.checkpoint import _begin_state
from megatron_paint.objectives.metric_table import METRICS
from tests.support import forked_ranks
from tests.support.exports import same, weights, weights_of_step
from tests.support.results import metrics

ROOT = Path(__file__).parents[2]
GRPO = ROOT / "examples" / "quickstart" / "grpo.yaml"
SHORT = (
    *("data.problems_per_step=4", "evaluation.problems=null", "run.tensorboard=false", "run.save_every=1"),
    *("megatron.pipeline_model_parallel_size=1", "objective.grpo.updates_per_batch=2", "evaluation.grading_seconds=60"),
)


def train(tmp_path, run_dir, *arguments):
    ended = forked_ranks.train(tmp_path, GRPO, f"run.dir={run_dir}", *SHORT, *arguments)
    assert ended.statuses == [0, 0], ended
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    return folder / "run", train(folder, folder / "run", "run.steps=3")


def test_what_a_run_logs(unbroken):
    run_dir, lines = unbroken
    for line in lines:
        # Of settings that this run does not have.
        sections = ("support/", "order/", "rollout/", "importance/", "experts/", "router/")
        others = {key for key in METRICS if key.startswith(sections)} | {"reveal/without_peer", "memory/device_gb"}
        assert {*line, *others, "skipped"} == set(METRICS)  # it has all that other objectives log, and more
        assert 0 < line["reward/mean"] < 1
        assert line["updates"] == 2
        assert line["sampler_gap/max"] < 1e-4
        assert line["num_tokens"] > line["loss_tokens"] > 0
    samples = [json.loads(line) for line in (run_dir / "samples" / "step_000002.jsonl").read_text().splitlines()]
    assert [sample["sample"] for sample in samples] == list(range(8)) * 4
    for start in range(0, 32, 8):
        group = [sample["advantage"] for sample in samples[start : start + 8]]
        assert sum(group) == pytest.approx(0, abs=1e-9)
    assert any(sample["advantage"] for sample in samples)


def test_a_resumed_run_is_the_unbroken_one(unbroken, tmp_path):
    run_dir, _ = unbroken
    train(tmp_path, tmp_path / "run", "run.steps=2")
    train(tmp_path, tmp_path / "run", "run.steps=3")
    assert metrics(tmp_path / "run") == metrics(run_dir)
    assert same(weights_of_step(tmp_path / "run", 3), weights_of_step(run_dir, 3))


def test_replayed_rollouts_give_the_same_steps(unbroken, tmp_path):
    run_dir, lines = unbroken
    replay = ("rollout.engine=replay", f"rollout.path={run_dir / 'samples'}", "objective.grpo.importance_limit=null")
    found = train(tmp_path, tmp_path / "run", "run.steps=1", *replay)
    assert found[0]["reward/mean"] == lines[0]["reward/mean"]
    assert found[0]["loss"] == pytest.approx(lines[0]["loss"], abs=1e-5)
    assert found[0]["grad_norm"] == pytest.approx(lines[0]["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("sharded", ["true", "false"])
def test_groups_that_teach_nothing_leave_the_model_alone(sharded, tmp_path):
    """No answer fits into one token: no update, a checkpoint all the same, from which the run resumes."""
    run_dir, layout = tmp_path / "run", f"megatron.use_distributed_optimizer={sharded}"
    lines = train(tmp_path, run_dir, "run.steps=1", "rollout.max_new_tokens=1", layout, "optimizer.weight_decay=0.1")
    lines = train(tmp_path, run_dir, "run.steps=2", "rollout.max_new_tokens=1", layout, "optimizer.weight_decay=0.1")
    for line in lines:
        assert (line["updates"], line["reward/equal_groups_share"], line["loss"]) == (0, 1, 0)
        assert line["grad_norm"] is None
    assert same(weights_of_step(run_dir, 2), weights(ROOT / "examples" / "quickstart" / "model"))
    first, second = (run_dir / "logs" / "console.log").read_text().split("\n==== ")[1:]
    for what in ("every group had equal rewards", "every response was cut off", "no response had a final answer"):
        assert f"warning: in the only step {what}" in first
        assert f"warning: in all 2 steps {what}" in second


def test_a_save_before_the_first_update_changes_nothing():
    """The state that it gives the optimiser is that of the first step: what follows is the same to the bit."""
    weights = []
    for begun in (False, True):
        torch.manual_seed(1)
        parameter = torch.nn.Parameter(torch.randn(5))
        adam = torch.optim.AdamW([parameter, torch.nn.Parameter(torch.empty(0))], lr=0.1, weight_decay=0.3)
        if begun:
            _begin_state(SimpleNamespace(chained_optimizers=[SimpleNamespace(optimizer=adam)]))
            assert set(adam.state[parameter]) == {"step", "exp_avg", "exp_avg_sq"}
            assert adam.param_groups[0]["lr"] == 0.1
        for _ in range(3):
            parameter.grad = torch.randn(5)
            adam.step()
        weights.append(parameter.detach().clone())
    assert torch.equal(*weights)
