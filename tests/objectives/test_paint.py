"""PAINT's own choices about a step, with a policy that only tells what it is asked: who is limited, and on what."""

import pytest

from megatron_paint.config.load import settings_of
from megatron_paint.data.prompts import Prompts
from megatron_paint.data.tokenizers import load_tokenizer
from megatron_paint.objectives import ObjectiveInputs, Paint
from megatron_paint.records import Problem, Rollout
from megatron_paint.rollouts.source import RolloutSource
from tests.support.tiny import make_model

SOLUTION = "We add 3 and 5. This gives 8. So it is \\boxed{8}."


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


class Teacher:
    """A policy whose teacher gives each token of a reference the same surprise."""

    def __init__(self, nats):
        self.nats, self.asked = nats, []

    def logprobs(self, sequences, *, weights):
        assert weights == "teacher"
        self.asked = sequences
        return [(-self.nats,) * len(sequence.response_ids) for sequence in sequences]


def limited(model, *, nats, rollouts, hidden_nats=1.0):
    """(samples before and after the limit, what the teacher was asked)."""
    made = settings_of(
        {
            "model": {"hf_path": str(model)},
            "data": {"train": "p"},
            "run": {"dir": "r"},
            "objective": {"reveal": {"hidden_nats": hidden_nats}},
        }
    )
    prompts = Prompts(made.prompts, load_tokenizer(model))
    source = RolloutSource(None, prompts, made.rollout, samples=1, seed=made.run.seed)
    paint = Paint(ObjectiveInputs(settings=made.objective, prompts=prompts, rollouts=source))
    teacher = Teacher(nats)
    problems = [Problem(id=str(i), problem="3 + 5?", solution=SOLUTION, answer="8") for i in range(len(rollouts))]
    sampled = [
        Rollout(
            problem_id=problem.id,
            sample_index=0,
            prompt_ids=prompts.student_prompt(problem),
            response_ids=prompts.tokenizer.encode(text),
            logprobs=None,
            finished=True,
        )
        for problem, text in zip(problems, rollouts, strict=True)
    ]
    outcomes = paint.outcomes(sampled, [])
    reveals = paint.reveals(problems, sampled, outcomes, step=1)
    less_hidden = paint.limit_hidden(teacher, problems, reveals)
    before, after = (
        list(paint.samples(problems, sampled, shown, outcomes, step=1)) for shown in (reveals, less_hidden)
    )
    return before, after, teacher.asked, prompts


def test_only_what_is_partly_hidden_is_asked_about(model):
    before, after, asked, prompts = limited(model, nats=0.5, rollouts=["nothing of it", "It is \\boxed{8}"])
    assert [sample.reveal.share for sample in before] == [1.0, 0.3]
    (reference,) = asked
    assert reference.prompt_ids == before[1].teacher_prompt_ids
    assert prompts.tokenizer.decode(reference.response_ids, keep_special=True) == SOLUTION
    assert after[0] == before[0]
    # Bytes are tokens here: of 0.5 nats each, 2 may be hidden. A cut there backs off out of the box; the next does not.
    hidden = len(SOLUTION) - before[1].reveal.shown_tokens
    assert after[1].reveal.hidden_nats == pytest.approx(0.5 * hidden)
    assert after[1].reveal.share == pytest.approx(1 - 1 / len(SOLUTION))
    assert after[1].reveal.shown_text == SOLUTION.removesuffix(".")
    assert after[1].teacher_prompt_ids == prompts.teacher_prompt(after[1].problem, after[1].reveal)
    assert after[1].teacher_prompt_ids != before[1].teacher_prompt_ids
    assert after[1].response_ids == before[1].response_ids


def test_a_teacher_that_knows_the_rest_is_shown_no_more(model):
    before, after, _, _ = limited(model, nats=1e-4, rollouts=["It is \\boxed{8}"])
    assert after[0].teacher_prompt_ids == before[0].teacher_prompt_ids
    assert after[0].reveal.hidden_nats < 1.0


def test_without_a_limit_nobody_is_asked(model):
    before, after, asked, _ = limited(model, nats=9.0, rollouts=["It is \\boxed{8}"], hidden_nats=None)
    assert after == before
    assert asked == []
