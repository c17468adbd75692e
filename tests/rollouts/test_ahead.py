"""Rollouts that are sampled one step ahead: which weights they are of, what is waited for, and what is kept."""

import dataclasses
import json
from types import SimpleNamespace

import pytest

from megatron_paint.base.errors import UserError
from megatron_paint.config.settings import RolloutSettings
from megatron_paint.records import Problem, Rollout, RolloutOrigin, WeightSpan
from megatron_paint.rollouts.ahead import RolloutsAhead
from megatron_paint.rollouts.source import RolloutSource

LAST = 4
PROMPTS = SimpleNamespace(tokenizer=SimpleNamespace(stop_ids=(0,)), student_prompt=lambda problem: (1, 2))


def problems(step):
    return [Problem(id=f"{step}-{i}", problem="?", solution="!", answer="!") for i in range(2)] if step <= LAST else []


class Engine:
    """A sampler whose responses hold the step whose weights sampled them. It notes what it is asked to do."""

    def __init__(self, *, loses=(), logprobs=True):
        self.done, self.loses, self.logprobs = [], loses, logprobs
        self.weights, self.pending = 0, None

    def sync_weights(self, step):
        assert self.pending is None  # nothing may be in flight while weights change
        self.weights = step - 1
        self.done.append(("sync", step))

    def generate(self, requests, sampling):
        assert self.pending is None
        self.done.append(("generate", [r.problem_id for r in requests]))
        return [self.rollout(request) for request in requests]

    def release_memory(self):
        """It has none."""

    def start(self, requests, sampling):
        assert self.pending is None
        self.done.append(("start", [r.problem_id for r in requests]))
        self.pending = {i: self.rollout(r) for i, r in enumerate(requests) if r.problem_id not in self.loses}

    def finish(self, *, wait=True):
        self.done.append("finish")
        found, self.pending = self.pending, None
        return found if wait else {0: found[0]}

    def rollout(self, request):
        return Rollout(
            problem_id=request.problem_id,
            sample_index=request.sample_index,
            prompt_ids=request.prompt_ids,
            response_ids=(self.weights, request.key % 97),
            logprobs=(-0.5, -1 / 3) if self.logprobs else None,
            finished=False,
            origin=RolloutOrigin(
                engine="vllm",
                server="http://a",
                weights=(WeightSpan(version=f"x/{self.weights}", start=0, end=2),),
                finish_reason="length",
            ),
        )


def source(engine, *, score=None, kind=RolloutsAhead, samples=1, **sampling):
    settings = RolloutSettings(engine="vllm", ahead=1, **sampling)
    more = {"upcoming": problems, "score": score} if kind is RolloutsAhead else {}
    return kind(engine, PROMPTS, settings, samples=samples, seed=7, **more)


def run(made, steps):
    return {step: made.rollouts(problems(step), step=step) for step in steps}


def test_each_step_trains_while_the_next_one_is_sampled():
    engine = Engine()
    found = run(source(engine), range(1, LAST + 1))
    assert engine.done == [
        *[("sync", 1), ("generate", ["1-0", "1-1"]), ("start", ["2-0", "2-1"])],
        *["finish", ("sync", 2), ("start", ["3-0", "3-1"])],
        *["finish", ("sync", 3), ("start", ["4-0", "4-1"])],
        "finish",  # nothing is sampled any more
    ]
    assert {step: [r.response_ids[0] for r in rollouts] for step, rollouts in found.items()} == {
        1: [0, 0],
        2: [0, 0],
        3: [1, 1],
        4: [2, 2],
    }
    assert [found[step][0].origin.behind for step in found] == [0, 1, 1, 1]
    assert [found[step][0].is_behind for step in found] == [False, True, True, True]
    serial = run(source(Engine(), kind=RolloutSource), range(1, LAST + 1))
    assert [[r.response_ids[1] for r in found[s]] for s in found] == [
        [r.response_ids[1] for r in serial[s]] for s in found
    ]


def test_what_no_server_could_sample_is_sampled_in_its_step():
    engine = Engine(loses=("3-0",))
    found = run(source(engine, samples=2), range(1, 4))
    assert ("generate", ["3-0", "3-0"]) in engine.done
    assert [(r.problem_id, r.sample_index) for r in found[3]] == [("3-0", 0), ("3-0", 1), ("3-1", 0), ("3-1", 1)]
    assert [r.response_ids[0] for r in found[3]] == [2, 2, 1, 1]
    assert [r.origin.behind for r in found[3]] == [0, 0, 1, 1]


def test_the_policy_scores_before_its_weights_change():
    """Once for each step; without a change, at the start of the next one, whose weights are still the same."""
    scored = []

    def score(sequences):
        scored.append([s.response_ids for s in sequences])
        return [(-1.0, -2.0)] * len(sequences)

    made = source(Engine(logprobs=False), score=score)
    made.rollouts(problems(1), step=1)
    assert not scored
    made.score_ahead()
    made.score_ahead()
    assert len(scored) == 1
    second = made.rollouts(problems(2), step=2)
    assert [r.logprobs for r in second] == [(-1.0, -2.0)] * 2
    assert len(scored) == 1
    third = made.rollouts(problems(3), step=3)  # step 2 changed no weight
    assert len(scored) == 2
    assert [r.logprobs for r in third] == [(-1.0, -2.0)] * 2
    assert scored[1] == [r.response_ids for r in third]


def test_engines_with_log_probabilities_are_not_waited_for():
    engine = Engine()
    made = source(engine)
    made.rollouts(problems(1), step=1)
    made.score_ahead()
    assert "finish" not in engine.done


@pytest.mark.parametrize("is_scored", [True, False])
def test_a_checkpoint_holds_what_was_sampled_ahead(is_scored):
    """To the bit, through JSON. A source that continues samples nothing of that step again."""

    def score(sequences):
        return [(-0.1, 1e-17)] * len(sequences)

    given = {"score": score if is_scored else None}
    wanted = run(source(Engine(logprobs=not is_scored), **given), range(1, 4))
    first = source(Engine(logprobs=not is_scored), **given)
    run(first, (1, 2))
    first.score_ahead()
    state = json.loads(json.dumps(first.state_dict()))
    assert json.loads(json.dumps(first.state_dict())) == state  # it does not use them up
    engine = Engine(logprobs=not is_scored)
    second = source(engine, **given)
    assert second.load_state_dict(state, problems(3)) == ()
    assert second.rollouts(problems(3), step=3) == wanted[3]
    assert engine.done == [("sync", 3), ("start", ["4-0", "4-1"])]
    assert first.rollouts(problems(3), step=3) == wanted[3]


def test_other_problems_or_prompts_are_sampled_again():
    engine = Engine()
    first = source(engine)
    run(first, (1, 2))
    state = first.state_dict()
    other = [problems(3)[0], dataclasses.replace(problems(3)[1], id="new")]
    second = source(engine)
    (message,) = second.load_state_dict(state, other)
    assert message.startswith("1 of the 2 rollouts that were sampled ahead is of other problems or prompts")
    found = second.rollouts(other, step=3)
    assert [(r.problem_id, r.origin.behind) for r in found] == [("3-0", 1), ("new", 0)]


def test_states_of_other_runs():
    assert source(Engine()).load_state_dict({}, problems(1)) == ()
    assert source(Engine()).state_dict() == {}
    (message,) = source(Engine(), kind=RolloutSource).load_state_dict({"step": 3}, problems(3))
    assert message == "the checkpoint's rollouts of the next step are not used, because rollout.ahead is 0 now"
    first = source(Engine())
    first.rollouts(problems(1), step=1)
    state = first.state_dict()
    for spoilt in ({**state, "step": None}, {**state, "rollouts": [{**state["rollouts"][0], "response_ids": "AAA"}]}):
        with pytest.raises(UserError, match=r"rollout\.ahead"):
            source(Engine()).load_state_dict(spoilt, problems(2))


@pytest.mark.parametrize("change", ["temperature", "score"])
def test_what_other_settings_have_sampled_is_sampled_again(change):
    """At another temperature the probabilities are others. What was not scored in time cannot be scored any more."""
    first = source(Engine(logprobs=False))
    first.rollouts(problems(1), step=1)
    state = json.loads(json.dumps(first.state_dict()))
    changed = {"temperature": {"temperature": 0.7}, "score": {"score": lambda sequences: []}}[change]
    engine = Engine(logprobs=False)
    second = source(engine, **changed)
    (message,) = second.load_state_dict(state, problems(2))
    assert "the settings of the sampling changed" in message
    assert [r.origin.behind for r in second.rollouts(problems(2), step=2)] == [0, 0]


def test_a_stop_takes_what_is_complete():
    engine = Engine()
    first = source(engine)
    first.rollouts(problems(1), step=1)
    state = first.state_dict(wait=False)
    assert [entry["problem_id"] for entry in state["rollouts"]] == ["2-0"]
    second = source(engine)
    assert second.load_state_dict(state, problems(2)) == ()
    assert [r.origin.behind for r in second.rollouts(problems(2), step=2)] == [1, 0]


def test_a_score_that_is_no_number_costs_one_step():
    """The step is skipped, and the next one samples with the current weights."""
    scores = iter([FloatingPointError("no number"), None])

    def score(sequences):
        if (error := next(scores, None)) is not None:
            raise error
        return [(-1.0, -2.0)] * len(sequences)

    made = source(Engine(logprobs=False), score=score)
    made.rollouts(problems(1), step=1)
    with pytest.raises(FloatingPointError):
        made.score_ahead()
    assert made.state_dict() == {}
    assert [r.origin.behind for r in made.rollouts(problems(2), step=2)] == [0, 0]
    assert [r.origin.behind for r in made.rollouts(problems(3), step=3)] == [1, 1]


def test_nothing_is_sampled_after_the_last_step():
    engine = Engine()
    made = source(engine)
    run(made, range(1, LAST + 1))
    assert engine.pending is None
    assert made.state_dict() == {}
