"""Replay: the rollouts of a file, by step, problem and sample, and every way in which a record can be bad."""

import json

import pytest

from megatron_paint.base.errors import UserError
from megatron_paint.records import Rollout
from megatron_paint.rollouts.engine import GenerationRequest, SamplingParameters
from megatron_paint.rollouts.replay import ReplaySampler

PROMPTS = {"a": (1, 2), "b": (3,)}
SAMPLING = SamplingParameters(max_new_tokens=8, temperature=1.0, top_p=1.0, top_k=0, stop_ids=frozenset())


def replay(sampler, step, problems="ab", samples=1):
    """The rollouts of a step, problem by problem."""
    requests = [
        GenerationRequest(problem_id=name, sample_index=index, prompt_ids=PROMPTS[name], key=0, step=step)
        for name in problems
        for index in range(samples)
    ]
    return sampler.generate(requests, SAMPLING)


def record(id="a", step=1, sample=0, ids=(7, 8, 9), **more):
    values = {"id": id, "step": step, "sample": sample, "response_ids": list(ids), **more}
    return {name: value for name, value in values.items() if value is not ...}


def write(path, records):
    path.write_text("".join((entry if isinstance(entry, str) else json.dumps(entry)) + "\n" for entry in records))
    return path


@pytest.fixture
def file(tmp_path):
    return tmp_path / "rollouts.jsonl"


def test_rollouts_of_a_step(file):
    write(file, [record("b", ids=[5]), "", record("a"), record("a", step=2, ids=[6])])
    assert replay(ReplaySampler(file, stop_ids=(9,)), 1) == [
        Rollout(
            problem_id="a", sample_index=0, prompt_ids=(1, 2), response_ids=(7, 8, 9), logprobs=None, finished=True
        ),
        Rollout(problem_id="b", sample_index=0, prompt_ids=(3,), response_ids=(5,), logprobs=None, finished=False),
    ]
    assert replay(ReplaySampler(file), 2, "a")[0].response_ids == (6,)


def test_a_recorded_end_is_believed(file):
    write(file, [record(finished=False), record("b", finished=True)])
    rollouts = replay(ReplaySampler(file, stop_ids=(9,)), 1)
    assert [rollout.finished for rollout in rollouts] == [False, True]


def test_several_samples_stand_problem_by_problem(file):
    write(file, [record(name, sample=index, ids=[index]) for index in (1, 0) for name in "ab"])
    rollouts = replay(ReplaySampler(file), 1, samples=2)
    assert [(r.problem_id, r.sample_index, r.response_ids) for r in rollouts] == [
        *[("a", 0, (0,)), ("a", 1, (1,))],
        *[("b", 0, (0,)), ("b", 1, (1,))],
    ]


def test_a_folder_of_sample_files(tmp_path):
    for step in (1, 2):
        write(tmp_path / f"step_{step:06d}.jsonl", [record(name, step, ..., ids=[step], loss=0.5) for name in "ab"])
    assert [r.response_ids for r in replay(ReplaySampler(tmp_path), 2)] == [(2,), (2,)]


@pytest.mark.parametrize(
    ("step", "samples", "message"),
    [
        (3, 1, r"step 3, problem 'a', sample 0; step 3, problem 'b', sample 0; it holds 2 rollouts of steps 1 to 1"),
        (1, 2, r"step 1, problem 'a', sample 1; step 1, problem 'b', sample 1; it holds"),
        (1, 4, r"step 1, problem 'a', sample 1; .*, problem 'a', sample 3 and 3 more; it holds"),
    ],
)
def test_missing_rollouts_are_named(file, step, samples, message):
    sampler = ReplaySampler(write(file, [record("a"), record("b")]))
    with pytest.raises(UserError, match=rf"rollout\.path: .*rollouts\.jsonl has no rollout for {message}"):
        replay(sampler, step, samples=samples)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{", "not a line of UTF-8 JSON"),
        ("[1]", "holds a list"),
        (record(id=...), "id is None"),
        (record(id=3), "id is 3; it must be the problem's id, as text"),
        (record(step=...), "step is None; it must be a whole number from 1"),
        (record(step=0), "step is 0"),
        (record(step=True), "step is True"),
        (record(sample=-1), "sample is -1; it must be a whole number from 0"),
        (record(sample="0"), "sample is '0'"),
        (record(ids=()), r"response_ids is \[\]; it must be a list of at least one token id"),
        ({"id": "a", "step": 1}, "response_ids is None"),
        (record(ids=[1, -2]), r"response_ids\[1\] is -2; token ids are whole numbers from 0"),
        (record(ids=[1.5]), r"response_ids\[0\] is 1\.5"),
        (record(ids=[2**40]), r"response_ids\[0\] is 1099511627776"),
        (record(finished="yes"), "finished is 'yes'"),
        (record("b"), r"step 1, problem 'b', sample 0 is already at .*rollouts\.jsonl:1; leave one of them out"),
    ],
)
def test_bad_records_are_named_by_file_and_line(file, bad, message):
    write(file, [record("b"), "", bad])
    with pytest.raises(UserError, match=rf"rollouts\.jsonl:3: {message}"):
        ReplaySampler(file)


def test_broken_utf8(file):
    file.write_bytes(b'{"id": "\xff"}\n')
    with pytest.raises(UserError, match=r"rollouts\.jsonl:1: not a line of UTF-8 JSON"):
        ReplaySampler(file)


def test_sources_that_hold_nothing(file, tmp_path):
    with pytest.raises(UserError, match=r"rollout\.path is null"):
        ReplaySampler(None)
    with pytest.raises(UserError, match=r"rollout\.path: .* cannot be read"):
        ReplaySampler(file)
    with pytest.raises(UserError, match=r"holds no \*\.jsonl file"):
        ReplaySampler(tmp_path)
    file.write_text("\n")
    with pytest.raises(UserError, match=r"rollout\.path: .* holds no rollouts"):
        ReplaySampler(file)


def test_a_response_that_is_another_models_or_too_long_is_named(file):
    sampler = ReplaySampler(write(file, [record("a", ids=[7, 300]), record("b", ids=range(9))]))
    requests = [GenerationRequest(problem_id=name, sample_index=0, prompt_ids=(), key=0, step=1) for name in "ab"]
    sampler.check(requests[:1], max_tokens=2, vocab_size=301)
    with pytest.raises(UserError, match=r"rollouts\.jsonl:1: response_ids holds 300, but the model has ids 0 to 299"):
        sampler.check(requests[:1], max_tokens=2, vocab_size=300)
    with pytest.raises(UserError, match=r"rollouts\.jsonl:2: response_ids holds 9 tokens, .*max_new_tokens=8: raise"):
        replay(sampler, 1)
