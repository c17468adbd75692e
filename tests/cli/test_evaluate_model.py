"""What `megatron-paint evaluate` samples with: the length of answers of each benchmark, and what the user is told."""

import json
from dataclasses import replace

import pytest

from megatron_paint.base.errors import UserError
from megatron_paint.cli.evaluate_model import answer_file, load_evaluators, notes, rows_at_once, sampled_with_of_all
from megatron_paint.cli.evaluate_options import requested
from megatron_paint.models.qwen3.shape import read_shape
from tests.support import tiny

POSITIONS = 1000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    tiny.make_model(folder / "model", positions=POSITIONS)
    for name, words in (("short", 1), ("long", 50)):
        rows = [{"id": str(n), "problem": "word " * (words - n), "answer": "1"} for n in range(2 if words > 1 else 1)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def asked(folder, *overrides, benchmarks="short,long"):
    files = ",".join(str(folder / f"{name}.jsonl") for name in benchmarks.split(","))
    return requested(
        config=None,
        model=folder / "model",
        benchmarks=files,
        samples=1,
        out=folder / "out",
        overrides=["model.dtype=float32", "evaluation.thinking=false", *overrides],
    )


def loaded(folder, *overrides, **options):
    request = asked(folder, *overrides, **options)
    shape = read_shape(folder / "model")
    return request, shape, load_evaluators(request, shape)


def test_a_megatron_checkpoint_has_its_configs_in_another_folder(folder):
    request, shape, evaluators = loaded(folder, benchmarks="short")
    (folder / "checkpoint").mkdir()
    (folder / "checkpoint" / "0.distcp").write_bytes(bytes(100))
    request = replace(request, folders=(folder / "checkpoint",))
    name, evaluator = evaluators[0]
    before = answer_file(request, name, evaluator, shape).sampled_with["weights"]
    config = folder / "model" / "config.json"
    content = config.read_text()
    config.write_text(json.dumps(json.loads(content) | {"rms_norm_eps": 1e-5}))
    assert answer_file(request, name, evaluator, shape).sampled_with["weights"] != before
    config.write_text(content)
    assert answer_file(request, name, evaluator, shape).sampled_with["weights"] == before


def longest_prompt(evaluator):
    return max(len(evaluator.prompt(problem)) for problem in evaluator.problems)


def test_the_default_fills_the_positions(folder):
    request, shape, evaluators = loaded(folder)
    for name, evaluator in evaluators:
        assert longest_prompt(evaluator) + evaluator.settings.max_new_tokens == POSITIONS
        assert (
            answer_file(request, name, evaluator, shape).sampled_with["max_new_tokens"]
            == evaluator.settings.max_new_tokens
        )
    (_, short), (_, long) = evaluators
    assert short.settings.max_new_tokens - long.settings.max_new_tokens == 5 * 49  # letters of a word, words
    said = notes(request, shape, evaluators)
    assert [f"tokens in {name} and not 38,912" in line for name, line in zip(("short", "long"), said, strict=True)]
    # The key-value cache holds two rows of all positions, and no third one.
    token_bytes = 2 * 2 * 2 * 8 * 4  # layers, keys and values, groups, size of a head, float32
    request, shape, evaluators = loaded(folder, f"rollout.cache_bytes={2.9 * POSITIONS * token_bytes}")
    assert rows_at_once(request.settings, shape, evaluators) == 2


def test_a_benchmark_does_not_depend_on_the_others(folder):
    (alone,) = loaded(folder, benchmarks="short")[2]
    assert alone[1].settings == loaded(folder)[2][0][1].settings


def test_a_value_too_large_is_one_error_for_all_benchmarks(folder):
    most = loaded(folder)[2][1][1].settings.max_new_tokens
    with pytest.raises(UserError) as refused:
        loaded(folder, f"evaluation.max_new_tokens={POSITIONS}")
    assert str(refused.value) == (
        f"evaluation.max_new_tokens={POSITIONS} is too large: the longest prompt of the evaluation has "
        f"{POSITIONS - most} tokens ({folder / 'long.jsonl'}:1), and the model has {POSITIONS} positions; set "
        f"evaluation.max_new_tokens to at most {most}"
    )
    request, shape, evaluators = loaded(folder, f"evaluation.max_new_tokens={most}")
    assert {evaluator.settings.max_new_tokens for _, evaluator in evaluators} == {most}
    assert notes(request, shape, evaluators) == []


def test_the_summary_has_the_value_of_each_benchmark(folder):
    request, shape, evaluators = loaded(folder)
    found = sampled_with_of_all({name: answer_file(request, name, evaluator, shape) for name, evaluator in evaluators})
    assert found["max_new_tokens"] == {name: evaluator.settings.max_new_tokens for name, evaluator in evaluators}
    assert found["temperature"] == 1.0
    request, shape, evaluators = loaded(folder, "evaluation.max_new_tokens=100")
    found = sampled_with_of_all({name: answer_file(request, name, evaluator, shape) for name, evaluator in evaluators})
    assert found["max_new_tokens"] == 100
