"""Replay: the rollouts of a file, by step, problem and sample, and every way in which a record can be bad."""

import json

import pytest

from megatron_paint.base.errors import UserError
from megatron_paint.records import Problem, Rollout
from megatron_paint.rollouts.replay import ReplayEngine

PROBLEMS = [Problem(id=name, problem="p", solution="s", answer="a") for name in ("a", "b")]
PROMPTS = [(1, 2), (3,)]


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
    assert ReplayEngine(file, stop_ids=(9,)).rollouts(1, PROBLEMS, PROMPTS) == [
        Rollout(
            problem_id="a", sample_index=0, prompt_ids=(1, 2), response_ids=(7, 8, 9), logprobs=None, finished=True
        ),
        Rollout(problem_id="b", sample_index=0, prompt_ids=(3,), response_ids=(5,), logprobs=None, finished=False),
    ]
    assert ReplayEngine(file).rollouts(2, PROBLEMS[:1], PROMPTS[:1])[0].response_ids == (6,)


def test_a_recorded_end_is_believed(file):
    write(file, [record(finished=False), record("b", finished=True)])
    rollouts = ReplayEngine(file, stop_ids=(9,)).rollouts(1, PROBLEMS, PROMPTS)
    assert [rollout.finished for rollout in rollouts] == [False, True]


def test_several_samples_stand_problem_by_problem(file):
    write(file, [record(name, sample=index, ids=[index]) for index in (1, 0) for name in "ab"])
    rollouts = ReplayEngine(file).rollouts(1, PROBLEMS, PROMPTS, samples=2)
    assert [(r.problem_id, r.sample_index, r.response_ids) for r in rollouts] == [
        *[("a", 0, (0,)), ("a", 1, (1,))],
        *[("b", 0, (0,)), ("b", 1, (1,))],
    ]


def test_a_folder_of_sample_files(tmp_path):
    for step in (1, 2):
        write(tmp_path / f"step_{step:06d}.jsonl", [record(name, step, ..., ids=[step], loss=0.5) for name in "ab"])
    assert [r.response_ids for r in ReplayEngine(tmp_path).rollouts(2, PROBLEMS, PROMPTS)] == [(2,), (2,)]


@pytest.mark.parametrize(
    ("step", "samples", "message"),
    [
        (3, 1, r"step 3, problem 'a', sample 0; step 3, problem 'b', sample 0; it holds 2 rollouts of steps 1 to 1"),
        (1, 2, r"step 1, problem 'a', sample 1; step 1, problem 'b', sample 1; it holds"),
        (1, 4, r"step 1, problem 'a', sample 1; .*, problem 'a', sample 3 and 3 more; it holds"),
    ],
)
def test_missing_rollouts_are_named(file, step, samples, message):
    engine = ReplayEngine(write(file, [record("a"), record("b")]))
    with pytest.raises(UserError, match=rf"rollout\.path: .*rollouts\.jsonl has no rollout for {message}"):
        engine.rollouts(step, PROBLEMS, PROMPTS, samples=samples)


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
        (record("b"), r"step 1, problem 'b', sample 0 stands already at .*rollouts\.jsonl:1; leave one of them out"),
    ],
)
def test_bad_records_are_named_by_file_and_line(file, bad, message):
    write(file, [record("b"), "", bad])
    with pytest.raises(UserError, match=rf"rollouts\.jsonl:3: {message}"):
        ReplayEngine(file)


def test_broken_utf8(file):
    file.write_bytes(b'{"id": "\xff"}\n')
    with pytest.raises(UserError, match=r"rollouts\.jsonl:1: not a line of UTF-8 JSON"):
        ReplayEngine(file)


def test_sources_that_hold_nothing(file, tmp_path):
    with pytest.raises(UserError, match=r"rollout\.path is null"):
        ReplayEngine(None)
    with pytest.raises(UserError, match=r"rollout\.path: .* cannot be read"):
        ReplayEngine(file)
    with pytest.raises(UserError, match=r"holds no \*\.jsonl file"):
        ReplayEngine(tmp_path)
    file.write_text("\n")
    with pytest.raises(UserError, match=r"rollout\.path: .* holds no rollouts"):
        ReplayEngine(file)
