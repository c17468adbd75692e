"""The order of problems: each epoch is a permutation, and the batch of a step depends on seed and step alone."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_paint.base.errors import UserError
from megatron_paint.data.problems import ProblemSet
from megatron_paint.records import Problem

GOLDEN_ORDER = [["2", "0", "3"], ["5", "4", "1"], ["3", "2", "1"]]  # pinned


def problem_set(count, per_step, seed=1):
    problems = tuple(Problem(id=str(i), problem="p", solution="s", answer="a") for i in range(count))
    return ProblemSet(problems, per_step, seed)


def ids(batch):
    return [problem.id for problem in batch]


class TestBatches:
    @settings(max_examples=60, deadline=None)
    @given(st.integers(1, 60), st.data())
    def test_each_epoch_holds_no_problem_twice(self, count, data):
        per_step = data.draw(st.integers(1, count))
        problems = problem_set(count, per_step)
        steps = count // per_step
        assert problems.steps_per_epoch == steps
        for epoch in range(3):
            seen = [i for step in range(steps) for i in ids(problems.batch(epoch * steps + step + 1))]
            assert len(seen) == steps * per_step == len(set(seen))

    def test_an_epoch_without_a_rest_is_a_permutation(self):
        problems = problem_set(24, 6)
        epochs = [[i for step in range(4) for i in ids(problems.batch(4 * epoch + step + 1))] for epoch in range(5)]
        assert all(sorted(order, key=int) == [str(i) for i in range(24)] for order in epochs)
        assert len(set(map(tuple, epochs))) == 5

    def test_the_rest_of_an_epoch_changes(self):
        problems = problem_set(7, 3)
        left_out = {
            next(iter({str(i) for i in range(7)} - {*ids(problems.batch(s)), *ids(problems.batch(s + 1))}))
            for s in range(1, 41, 2)
        }
        assert len(left_out) > 3

    def test_a_step_does_not_depend_on_what_came_before(self):
        in_order = [ids(problem_set(50, 8).batch(step)) for step in range(1, 40)]
        steps = list(range(1, 40))
        random.Random(0).shuffle(steps)
        jumping = problem_set(50, 8)
        assert {step: ids(jumping.batch(step)) for step in steps} == dict(enumerate(in_order, start=1))

    def test_order_is_stable_between_versions(self):
        assert [ids(problem_set(6, 3, seed=5).batch(step)) for step in (1, 2, 3)] == GOLDEN_ORDER

    def test_seeds_differ(self):
        assert ids(problem_set(50, 50, seed=1).batch(1)) != ids(problem_set(50, 50, seed=2).batch(1))

    def test_epochs(self):
        problems = problem_set(7, 2)
        assert [problems.epoch(step) for step in (1, 3, 4, 6, 7)] == [1, 1, 2, 2, 3]

    def test_more_problems_a_step_than_there_are(self):
        with pytest.raises(UserError, match=r"data\.problems_per_step is 8, but data\.train has 7 usable problems"):
            problem_set(7, 8)

    def test_steps_count_from_1(self):
        with pytest.raises(ValueError, match="count from 1, not from 0"):
            problem_set(3, 1).batch(0)
