"""`megatron-paint evaluate` of a model that YaRN stretches: its answers are those of `transformers`."""

import json
from pathlib import Path

import torch
from transformers import Qwen3ForCausalLM

from megatron_paint.cli.evaluate_model import load_evaluators
from megatron_paint.cli.evaluate_options import requested
from megatron_paint.models.qwen3.shape import read_shape
from tests.support import forked_ranks, tiny

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}


def greedy_of_transformers(model: Path, settings: Path) -> dict[str, list[int]]:
    """The greedy answer to each held-out problem, by problem."""
    asked = requested(config=settings, model=None, benchmarks=None, samples=None, out=None, overrides=[])
    ((_, evaluator),) = load_evaluators(asked, read_shape(model))
    loaded = Qwen3ForCausalLM.from_pretrained(model)
    answers = {}
    for problem in evaluator.problems:
        prompt = torch.tensor([list(evaluator.prompt(problem))])
        assert prompt.size(1) > 64, "the prompt must be longer than the original length"
        stops = sorted(evaluator.prompts.tokenizer.stop_ids)
        ids = loaded.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=stops, pad_token_id=256)
        answers[problem.id] = ids[0, prompt.size(1) :].tolist()
    return answers


def test_answers_beyond_the_original_length(tmp_path):
    model = tiny.make_model(tmp_path / "model", positions=64, rope_parameters=YARN)
    problems = tiny.make_problems(tmp_path / "problems.jsonl")
    settings = tiny.make_settings(tmp_path, model, problems, layout="tensor_model_parallel_size: 2")
    command = ("evaluate", settings, "--out", tmp_path / "out")
    ended = forked_ranks.run(tmp_path, *command)
    assert ended.statuses == [0, 0], ended
    lines = [json.loads(line) for line in (tmp_path / "out" / "problems.answers.jsonl").read_text().splitlines()]
    found = {line["id"]: line["response_ids"] for line in lines[1:] if line["sample"] == -1}
    wanted = greedy_of_transformers(model, settings)
    assert len(wanted) == 3
    assert found == wanted

    # The same weights without YaRN give other answers, so those of the stretched model are not continued.
    config = json.loads((model / "config.json").read_text())
    config |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "max_position_embeddings": 256}
    (model / "config.json").write_text(json.dumps(config))
    assert greedy_of_transformers(model, settings) != wanted
    message = forked_ranks.run(tmp_path, *command).message
    assert "yarn was {" in message
    assert "and is None); give another --out" in message
