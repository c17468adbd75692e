"""AdaSTaR's order of problems, compared with a naive one that sorts all problems in each step."""

import json
import random
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_paint.base.errors import UserError
from megatron_paint.config.load import settings_of
from megatron_paint.data.order import AdaStarOrder, ShuffledOrder, num_promoted, problem_order
from megatron_paint.data.problems import ProblemSet
from megatron_paint.records import Problem
from tests.data.naive_order import NaiveOrder, first_order

FIRST_BATCHES = {1: "6230451", 2: "1253406"}  # pinned: the order of seven problems without a visit, by data.seed


def problem_set(count, per_step, seed=1):
    problems = tuple(Problem(id=str(i), problem="p", solution="s", answer="a") for i in range(count))
    return ProblemSet(problems, per_step, seed)


def names(count):
    return [str(i) for i in range(count)]


def ids(batch):
    return [problem.id for problem in batch]


@pytest.mark.parametrize("skill", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(("count", "per_step"), [(1, 1), (7, 7), (40, 6), (61, 32)])
def test_batches_are_those_of_the_naive_rule(count, per_step, skill):
    """Over 300 steps with any number of rollouts a problem; some steps are skipped, and some end in a restart."""
    draw = random.Random(f"{count} {per_step} {skill}")
    order, naive = AdaStarOrder(problem_set(count, per_step)), NaiveOrder(first_order(names(count)), per_step)
    talent = {name: draw.random() for name in naive.places}
    for step in range(1, 301):
        batch = ids(order.batch(step))
        assert batch == naive.batch()
        assert ids(order.batch(step)) == batch
        if draw.random() < 0.1:
            continue  # skipped
        chance = {name: skill if skill in (0.0, 1.0) else (skill + talent[name]) / 2 for name in batch}
        verdicts = {name: [draw.random() < chance[name] for _ in range(draw.randint(1, 8))] for name in batch}
        metrics = order.record(step, verdicts)
        votes = [vote for votes in verdicts.values() for vote in votes]
        assert metrics == {
            "order/accuracy": sum(votes) / len(votes),
            "order/promoted": naive.record(step, verdicts),
            "order/oldest_visit": naive.oldest,
        }
        if draw.random() < 0.2:
            saved = json.loads(json.dumps(order.state_dict()))
            order = AdaStarOrder(problem_set(count, per_step))
            assert order.load_state_dict(saved) == ()
            assert order.state_dict() == saved
            assert saved["visits"] == naive.visited
    assert max(step for step, _, _ in naive.visits.values()) > 250


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 200), st.integers(1, 400), st.data())
def test_promoted_problems_are_rounded_exactly(problems, rollouts, data):
    """The count n is the whole number next to m a^2: |2 m a^2 - 2 n| <= 1, and even n at a half; from 1 to m."""
    right = data.draw(st.integers(0, rollouts))
    number = num_promoted(problems, right=right, rollouts=rollouts)
    twice = Fraction(2 * problems * right**2, rollouts**2)
    assert 1 <= number <= problems
    if twice <= 1:
        assert number == 1
    else:
        assert abs(twice - 2 * number) < 1 or (abs(twice - 2 * number) == 1 and number % 2 == 0)


@pytest.mark.parametrize(
    ("problems", "right", "rollouts", "number"),
    [
        (32, 32, 32, 32),
        (32, 16, 32, 8),
        (32, 24, 32, 18),
        (32, 0, 32, 1),  # at least one
        (32, 1, 32, 1),  # 1/32
        (6, 3, 6, 2),  # 1.5
        (10, 40, 80, 2),  # 2.5
        (90, 1, 30, 1),  # 0.1
        (8, 3, 12, 1),  # 0.5 is rounded to 0
    ],
)
def test_promoted_problems_by_hand(problems, right, rollouts, number):
    assert num_promoted(problems, right=right, rollouts=rollouts) == number


def test_old_visits_come_first_and_then_low_win_rates():
    order = AdaStarOrder(problem_set(6, 3))
    a, b, c, d, e, f = first_order(names(6))
    assert ids(order.batch(1)) == [a, b, c]
    assert order.record(1, {a: [True, True], b: [True, False], c: [True]})["order/promoted"] == 2  # 3 (4/5)^2 = 1.92
    assert ids(order.batch(2)) == [c, d, e]  # c is not promoted
    order.record(2, {c: [True], d: [True], e: [True]})
    assert ids(order.batch(3)) == [f, b, a]  # b has the win rate 1/2, a has 1
    order.record(3, {f: [False] * 3, b: [True] * 3, a: [True] * 3})  # 3 (2/3)^2 = 1.33: f alone
    assert ids(order.batch(4)) == [b, a, c]
    assert order.state_dict()["visits"][b] == [1, 1, 2]  # what was not promoted keeps its win rate
    assert order.state_dict()["visits"][f] == [3, 0, 3]


def test_a_model_that_solves_nothing_still_sees_all_problems():
    order = AdaStarOrder(problem_set(9, 4))
    seen = []
    for step in range(1, 10):
        batch = ids(order.batch(step))
        assert order.record(step, {name: [False] for name in batch})["order/promoted"] == 1
        seen.append(batch[0])
    assert seen == first_order(names(9))


def test_ties_are_stable_between_versions_and_follow_the_seed():
    assert {seed: "".join(first_order(names(7), seed)) for seed in FIRST_BATCHES} == FIRST_BATCHES


def test_a_state_is_a_copy():
    order = AdaStarOrder(problem_set(4, 2))
    order.record(1, {name: [True] for name in ids(order.batch(1))})
    state = order.state_dict()
    before = json.dumps(state)
    order.record(2, {name: [True] for name in ids(order.batch(2))})
    assert json.dumps(state) == before != json.dumps(order.state_dict())


def test_a_checkpoint_of_another_order_has_no_visits():
    order = AdaStarOrder(problem_set(4, 2))
    (message,) = order.load_state_dict({})
    assert message.startswith("data.order=adastar begins without visits")
    assert ids(order.batch(5)) == first_order(names(4))[:2]


def test_problems_may_come_and_go():
    """Visits belong to ids: what is gone is dropped, and what is new comes first."""
    order = AdaStarOrder(problem_set(4, 4))
    order.record(7, {name: [True] for name in ids(order.batch(7))})
    problems = tuple(Problem(id=i, problem="", solution="", answer="") for i in ("1", "new", "3"))
    changed = AdaStarOrder(ProblemSet(problems, 1, 1))
    assert changed.load_state_dict(order.state_dict()) == (
        "data.train no longer has 2 of the 4 problems that the run has visited",
    )
    assert ids(changed.batch(8)) == ["new"]
    assert set(changed.state_dict()["visits"]) == {"1", "3"}
    with pytest.raises(ValueError, match="step 7 cannot be recorded after step 7"):
        changed.record(7, {"new": [True]})


@pytest.mark.parametrize(
    "state", [{"rule": "adastar"}, {"visits": {"1": [1, 2]}}, {"visits": {"1": "abc"}}, {"visits": 3}]
)
def test_a_state_that_cannot_be_read(state):
    with pytest.raises(UserError, match=r"visits of data\.order=adastar cannot be read .*: remove the checkpoint"):
        AdaStarOrder(problem_set(4, 2)).load_state_dict(state)


def test_what_cannot_be_recorded():
    order = AdaStarOrder(problem_set(4, 2))
    first, second = ids(order.batch(1))
    other = first_order(names(4))[2]
    for verdicts in ({}, {first: [True]}, {first: [True], other: [True]}, {first: [True], second: []}):
        with pytest.raises(ValueError, match="step 1 has verdicts on "):
            order.record(1, verdicts)
    order.record(1, {first: [False], second: [True]})
    with pytest.raises(ValueError, match="step 1 cannot be recorded after step 1"):
        order.record(1, {name: [True] for name in ids(order.batch(1))})
    with pytest.raises(ValueError, match="count from 1, not from 0"):
        order.batch(0)


def test_the_order_of_the_settings():
    tree = {"model": {"hf_path": "m"}, "data": {"train": "p.jsonl", "order": "adastar"}, "run": {"dir": "r"}}
    problems = problem_set(6, 2)
    assert isinstance(problem_order(settings_of(tree).data, problems), AdaStarOrder)
    del tree["data"]["order"]
    shuffled = problem_order(settings_of(tree).data, problems)
    assert isinstance(shuffled, ShuffledOrder)
    assert [shuffled.batch(step) for step in (1, 2, 3, 4)] == [problems.batch(step) for step in (1, 2, 3, 4)]
    assert (shuffled.record(1, {}), shuffled.state_dict(), shuffled.load_state_dict({"rule": "adastar"})) == (
        {},
        {},
        (),
    )
