"""PAINT with several responses a problem: what is graded, kept, shown and trained on, by hand."""

import dataclasses
import math

import pytest

from megatron_paint.config.load import settings_of
from megatron_paint.data.prompts import Prompts
from megatron_paint.data.tokenizers import load_tokenizer
from megatron_paint.grading.grade import Grade
from megatron_paint.objectives import ObjectiveInputs, Paint
from megatron_paint.objectives.metrics import metrics_of, sample_lines
from megatron_paint.records import Problem, Rollout, SampleScore, StepReport, UpdateReport
from megatron_paint.rollouts.source import RolloutSource, sample_key
from megatron_paint.runtime.timer import Timer
from tests.support.tiny import make_model

PROBLEMS = [
    Problem(id=f"p{i}", problem=f"{i} + 5?", solution=f"We add. It is \\boxed{{{i + 5}}}.", answer=str(i + 5))
    for i in range(3)
]
# Two responses are right for p0, one for p1, none for p2.
TEXTS = [
    ["It is \\boxed{5}, or five.", "No.", "It is \\boxed{5}."],
    ["Perhaps 9.", "\\boxed{6}", "Six."],
    ["7", "8", "9"],
]


class Notes:
    """A policy and a sampler: samples the texts above, and notes what it is trained on."""

    def __init__(self, encode, texts):
        self.encode, self.texts, self.trained = encode, [text for group in texts for text in group], []

    def sync_weights(self, step):
        pass

    def release_memory(self):
        pass

    def generate(self, requests, sampling):
        self.requests = requests
        return [
            Rollout(
                problem_id=request.problem_id,
                sample_index=request.sample_index,
                prompt_ids=request.prompt_ids,
                response_ids=self.encode(text),
                logprobs=(-1.0,) * len(self.encode(text)),
                finished=True,
            )
            for request, text in zip(requests, self.texts, strict=True)
        ]

    def update(self, samples, loss, *, lr):
        self.trained.append(samples)
        scores = tuple(
            SampleScore(
                loss_sum=2.0,
                num_tokens=len(sample.response_ids),
                loss_tokens=len(sample.response_ids),
                selected=(0,),
                sums={"student_entropy": 0.5 * len(sample.response_ids)},
                token_logprobs=(-1.0,) * len(sample.response_ids),
            )
            for sample in samples
        )
        return UpdateReport(scores=scores, grad_norm=3.0)


class Graders:
    """Grades by text alone, and counts the calls."""

    calls = 0

    def grade(self, responses):
        self.calls += 1
        outcomes = ["right" if f"\\boxed{{{problem.answer}}}" in text else "wrong" for text, problem in responses]
        return [Grade(correct=outcome == "right", extracted=None, outcome=outcome) for outcome in outcomes]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


def step(model, *, texts=TEXTS, problems=PROBLEMS, reveal=None, prompts=None, **rollout):
    """(result, metrics, policy, graders, prompts) of one step."""
    made = settings_of(
        {
            "model": {"hf_path": str(model)},
            "data": {"train": "p"},
            "run": {"dir": "r"},
            "objective": {"reveal": reveal or {}},
            "rollout": {"samples_per_problem": len(texts[0]), **rollout},
            "prompts": prompts or {},
        }
    )
    found = Prompts(made.prompts, load_tokenizer(model))
    policy, graders = Notes(found.tokenizer.encode, texts), Graders()
    samples = made.needs.samples_per_problem
    source = RolloutSource(policy, found, made.rollout, samples=samples, seed=made.run.seed)
    inputs = ObjectiveInputs(
        settings=made.objective,
        prompts=found,
        rollouts=source,
        grades_rollouts=made.needs.graders,
        graders=graders,
    )
    paint = Paint(inputs)
    timer = Timer()
    result = paint.step(policy, problems, step=2, lr=1e-3, timer=timer)
    return result, metrics_of(result, step=2, lr=1e-3, seconds=timer.seconds), policy, graders, found


def trained(policy):
    """Problem and sample index of what was trained on."""
    return [(sample.problem.id, sample.sample_index) for (samples,) in [policy.trained] for sample in samples]


def test_all_responses_without_grades(model):
    result, metrics, policy, graders, _ = step(model)
    assert graders.calls == 0
    assert trained(policy) == [(f"p{i}", k) for i in range(3) for k in range(3)]
    assert [s.key for s in result.samples] == [
        sample_key(1, step=2, problem=problem, index=index) for problem in PROBLEMS for index in range(3)
    ]
    assert len({request.key for request in policy.requests}) == 9
    assert not {"reward/mean", "rollout/kept", "time/grade_s"} & set(metrics)
    assert {sample.correct for sample in result.samples} == {None}


def test_grades_that_decide_nothing(model):
    plain, _, untouched, *_ = step(model)
    result, metrics, policy, graders, _ = step(model, grade=True)
    assert graders.calls == 1
    assert trained(policy) == trained(untouched)
    assert [sample.correct for sample in result.samples] == [True, False, True, False, True, *[False] * 4]
    assert [dataclasses.replace(sample, correct=None) for sample in result.samples] == list(plain.samples)
    assert metrics["reward/mean"] == 3 / 9
    assert "time/grade_s" in metrics
    assert "rollout/kept" not in metrics


def test_correct(model):
    result, metrics, policy, graders, _ = step(model, keep="correct")
    assert graders.calls == 1
    assert trained(policy) == [("p0", 0), ("p0", 2), ("p1", 1)]
    assert [sample.left_out for sample in result.samples] == [None, "wrong", None, "wrong", None, *["wrong"] * 4]
    for sample in result.samples:
        assert (sample.reveal is None) == (sample.teacher_prompt_ids is None) == (sample.left_out is not None)
    assert metrics["reward/mean"] == 3 / 9
    assert (metrics["rollout/kept"], metrics["rollout/problems_without_correct"]) == (3, 1)
    assert "reveal/without_peer" not in metrics
    assert "time/grade_s" in metrics


def test_shortest_correct(model):
    result, metrics, policy, _, _ = step(model, keep="shortest_correct")
    assert trained(policy) == [("p0", 2), ("p1", 1)]
    lengths = [len(TEXTS[0][2]), len(TEXTS[1][1])]  # a token is a byte
    all_tokens = sum(len(text) for group in TEXTS for text in group)
    assert [score.num_tokens for score in result.scores] == [len(text) for group in TEXTS for text in group]
    assert [score.loss_tokens for score in result.scores] == [0, 0, lengths[0], 0, lengths[1], 0, 0, 0, 0]
    assert (metrics["num_tokens"], metrics["loss_tokens"]) == (all_tokens, sum(lengths))
    assert metrics["loss"] == 4.0 / sum(lengths)
    # Only of what was trained on: two selected tokens, and a mean overlap of the two reveals.
    assert metrics["selected/share"] == 2 / sum(lengths)
    assert metrics["entropy/student_mean"] == 0.5
    assert metrics["overlap/mean"] == 1.0
    assert metrics["response/length_mean"] == all_tokens / 9
    assert all(score.token_logprobs is None for score in result.scores)


def test_the_choice_does_not_change_what_is_shown(model):
    """Partners of a step are drawn for all responses, so a kept one is shown the same under every choice."""
    for reveal in ({"solution": "wrong"}, {"rule": "full", "solution": "other_example"}, {"rule": "shuffled"}):
        everything, *_ = step(model, reveal=reveal)
        kept, *_ = step(model, reveal=reveal, keep="correct")
        found = [(sample.teacher_prompt_ids, sample.reveal) for sample in kept.samples if sample.left_out is None]
        chosen = [sample for sample in everything.samples if (sample.problem.id, sample.sample_index) in KEPT]
        assert found == [(sample.teacher_prompt_ids, sample.reveal) for sample in chosen]
    # One problem alone is kept, and it still has a partner.
    only_one = [TEXTS[0], *[["No."] * 3] * 2]
    _, _, policy, _, _ = step(model, texts=only_one, reveal={"solution": "wrong"}, keep="correct")
    assert trained(policy) == [("p0", 0), ("p0", 2)]


KEPT = {("p0", 0), ("p0", 2), ("p1", 1)}


def test_a_step_without_a_right_response_updates_nothing(model):
    result, metrics, policy, _, _ = step(model, texts=[["No."] * 2] * 3, keep="correct")
    assert policy.trained == []
    assert (result.updates, metrics["loss"], metrics["rollout/kept"]) == ((), 0.0, 0)
    assert metrics["rollout/problems_without_correct"] == 3
    for name in ("grad_norm", "overlap/mean", "reveal/mean", "entropy/student_mean"):
        assert math.isnan(metrics[name]), name
    assert metrics["selected/share"] == 0.0
    assert len(sample_lines(report(result, metrics), decode=str)) == 6


def report(result, metrics):
    return StepReport(step=2, metrics=metrics, samples=result.samples, scores=result.scores)


def test_a_teacher_is_shown_the_shortest_other_right_response(model):
    """Without solutions: nobody has one."""
    bare = [Problem(id=p.id, problem=p.problem, solution="", answer=p.answer) for p in PROBLEMS]
    result, metrics, policy, _, prompts = step(
        model, problems=bare, reveal={"solution": "peer_rollout", "rule": "full"}, prompts={"teacher_thinking": False}
    )
    assert trained(policy) == [("p0", 0), ("p0", 1), ("p0", 2), ("p1", 0), ("p1", 2)]
    shown = {(s.problem.id, s.sample_index): s.reveal for s in result.samples if s.reveal is not None}
    assert {place: reveal.peer for place, reveal in shown.items()} == {
        ("p0", 0): 2,
        ("p0", 1): 2,
        ("p0", 2): 0,
        ("p1", 0): 1,
        ("p1", 2): 1,
    }
    for (problem, _), reveal in shown.items():
        assert reveal.shown_text == TEXTS[int(problem[1:])][reveal.peer]
    sample = result.samples[2]
    expected = prompts.full_teacher_prompt(Problem(id="p0", problem="0 + 5?", solution=TEXTS[0][0], answer="5"))
    assert sample.teacher_prompt_ids == expected
    assert [s.left_out for s in result.samples if s.left_out] == ["no_peer"] * 4
    assert (metrics["rollout/kept"], metrics["reveal/without_peer"]) == (5, 4)


def test_oasis(model):
    """Of each problem the shortest right response, and another right response in place of the solution."""
    result, metrics, policy, _, _ = step(model, reveal={"solution": "peer_rollout"}, keep="shortest_correct")
    assert trained(policy) == [("p0", 2)]
    assert result.samples[2].reveal.peer == 0
    assert (metrics["rollout/kept"], metrics["reveal/without_peer"]) == (1, 1)
    assert metrics["rollout/problems_without_correct"] == 1


def test_a_response_longer_as_text_than_it_may_be_is_no_peer(model):
    """As text it must have at most rollout.max_new_tokens tokens: room for more was not planned."""
    longest = len(TEXTS[0][0])
    for limit, peers in ((longest, [2, 2, 0]), (longest - 1, [2, 2, None])):
        result, *_ = step(model, reveal={"solution": "peer_rollout"}, max_new_tokens=limit)
        assert [s.reveal and s.reveal.peer for s in result.samples[:3]] == peers
    assert result.samples[2].left_out == "no_peer"


def test_the_lines_of_the_samples(model):
    result, metrics, *_ = step(model, reveal={"solution": "peer_rollout"}, keep="correct")
    lines = sample_lines(report(result, metrics), decode=lambda ids: "")
    assert [line["sample"] for line in lines] == [0, 1, 2] * 3  # all of them, so a replay finds them
    assert [line["correct"] for line in lines] == [True, False, True, False, True, *[False] * 4]
    assert [line.get("left_out") for line in lines] == [None, "wrong", None, "wrong", "no_peer", *["wrong"] * 4]
    assert (lines[0]["reveal"]["solution"], lines[0]["reveal"]["peer"]) == ("peer_rollout", 2)
    assert lines[1]["reveal"] is None
    plain, metrics, *_ = step(model)
    for line in sample_lines(report(plain, metrics), decode=lambda ids: ""):
        assert not {"correct", "left_out"} & set(line)
        assert not {"solution", "view", "of", "example", "peer"} & set(line["reveal"])
    example, metrics, *_ = step(model, reveal={"solution": "other_example", "rule": "full"})
    line = sample_lines(report(example, metrics), decode=lambda ids: "")[0]
    other = PROBLEMS[int(line["reveal"]["of"][1:])]
    assert (line["reveal"]["example"], line["reveal"]["reference_text"]) == (other.problem, other.solution)
