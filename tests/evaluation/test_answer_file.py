"""The file of answers: an interrupted evaluation keeps its answers, and other settings or prompts are refused."""

import pytest

from megatron_paint.base.errors import UserError
from megatron_paint.evaluation.answer_file import AnswerFile
from megatron_paint.records import Rollout


def rollout(id, sample, ids=(1, 2)):
    return Rollout(problem_id=id, sample_index=sample, prompt_ids=(), response_ids=ids, logprobs=None, finished=True)


def answer_file(path, prompts=None, **sampled_with):
    return AnswerFile(path, {"model": "m", "temperature": 1.0} | sampled_with, prompts or {"a": "x", "b": "y"})


def test_answers_are_kept(tmp_path):
    path = tmp_path / "sub" / "a.jsonl"
    assert answer_file(path).begin() == {}
    answer_file(path).add([rollout("a", 0), rollout("a", -1, ids=(7,))])
    intact = path.read_bytes()
    assert answer_file(path).begin() == {("a", 0): rollout("a", 0), ("a", -1): rollout("a", -1, ids=(7,))}
    assert path.read_bytes() == intact
    header = intact.index(b"\n") + 1  # the header is written atomically
    for cut in range(header, len(intact)):  # a crash at any byte loses only the last answer
        path.write_bytes(intact[:cut])
        there = answer_file(path).begin()
        assert len(there) == intact[: cut + 1].count(b"\n") - 1
        answer_file(path).add([rollout("b", 0)])
        assert ("b", 0) in answer_file(path).begin()


def test_answers_to_problems_that_are_not_used_now_are_kept(tmp_path):
    path = tmp_path / "a.jsonl"
    answer_file(path).begin()
    answer_file(path).add([rollout("a", 0), rollout("b", 0)])
    intact = path.read_bytes()
    assert set(answer_file(path, {"a": "x"}).begin()) == {("a", 0), ("b", 0)}
    assert path.read_bytes() == intact
    with path.open("a") as file:
        file.write("cut sho")  # so that the file is written again
    answer_file(path, {"a": "x"}).begin()
    assert path.read_bytes() == intact
    with pytest.raises(UserError, match="another prompt of problem 'b'"):
        answer_file(path, {"a": "x", "b": "z"}).begin()


@pytest.mark.parametrize(
    "line",
    [
        '{"sample": 0, "response_ids": [1], "finished": true}',
        '{"id": "a", "sample": 0, "response_ids": [1]}',
        '{"id": "a", "sample": 0, "response_ids": 3, "finished": true}',
        '{"id": "a", "sample": 0, "response_ids": ["x"], "finished": true}',
        '{"id": ["a"], "sample": 0, "response_ids": [1], "finished": true}',
        "[" * 100_000,
    ],
    ids=range(6),
)
def test_a_damaged_answer_is_sampled_again(line, tmp_path):
    path = tmp_path / "a.jsonl"
    answer_file(path).begin()
    answer_file(path).add([rollout("b", 0)])
    with path.open("a") as file:
        file.write(line + "\n")
    assert answer_file(path).begin() == {("b", 0): rollout("b", 0)}
    assert line not in path.read_text()


def test_answers_with_other_settings_are_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    answer_file(path, seed=1).begin()
    answer_file(path, seed=1).add([rollout("a", 0)])
    with pytest.raises(UserError, match="seed was 1 and is 2"):
        answer_file(path, seed=2).begin()
    with pytest.raises(UserError, match="another prompt of problem 'a'"):
        answer_file(path, {"a": "z"}, seed=1).begin()
    assert answer_file(path, {"a": "x", "c": "new"}, seed=1).begin() == {("a", 0): rollout("a", 0)}
    for content in ('{"id": "a"}\n', "my notes\nline two\n"):
        path.write_text(content)
        with pytest.raises(UserError, match="is not a file of answers"):
            answer_file(path).begin()
        assert path.read_text() == content
