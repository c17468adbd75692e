"""The sparse set against a loop in numpy: counts, ties, thresholds, keys, independence of packing. Axes: T tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_paint.losses import InterpolationLossConfig
from megatron_paint.losses.selection import select_positions, selected_count
from tests.losses.losses_dense import dense_selection


def _select(student, teacher, lengths, config, keys=None) -> list[bool]:
    student_T, teacher_T = torch.as_tensor(student, dtype=torch.float64), torch.as_tensor(teacher, dtype=torch.float64)
    return select_positions(student_T, teacher_T, lengths=lengths, config=config, rollout_keys=keys).tolist()


@pytest.mark.parametrize(
    ("length", "fraction", "count"), [(30, 0.1, 3), (31, 0.1, 4), (1, 0.1, 1), (0, 0.1, 0), (7, 0.0, 0), (7, 1.0, 7)]
)
def test_counts(length, fraction, count):
    """0.1 * 30 is 3.0000000000000004 in floating point and still 3 positions."""
    assert selected_count(length, fraction) == count
    config = InterpolationLossConfig(fraction=fraction)
    assert sum(_select(range(length), [0.0] * length, [length], config)) == count


def test_ties_go_to_the_earlier_position():
    config = InterpolationLossConfig(fraction=0.5)
    assert _select([1, 1, 1, 1], [0, 0, 0, 0], [4], config) == [True, True, False, False]
    assert _select([1, 2, 1, 2, 1], [0, 0, 0, 0, 0], [5], config) == [True, True, False, True, False]


def test_threshold_is_strict():
    config = InterpolationLossConfig(positions="threshold", threshold_nats=0.5)
    assert _select([0.5, 0.75, 0.0], [0.0, 0.0, 0.75], [3], config) == [False, True, True]


def test_directions():
    student, teacher = [3.0, 0.0, 1.0], [0.0, 2.0, 1.0]
    for mismatch, first in (("absolute", 0), ("teacher_minus_student", 1), ("student_minus_teacher", 0)):
        config = InterpolationLossConfig(mismatch=mismatch, fraction=0.3)
        assert _select(student, teacher, [3], config) == [position == first for position in range(3)]


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_equals_the_loop(data):
    """Entropies on a coarse grid, so that ties are everywhere; rollouts of no and of one token."""
    lengths = data.draw(st.lists(st.integers(0, 12), max_size=6))
    grid = st.lists(st.integers(0, 4), min_size=sum(lengths), max_size=sum(lengths))
    student, teacher = np.array(data.draw(grid)) / 4.0, np.array(data.draw(grid)) / 4.0
    positions = data.draw(st.sampled_from(["top_fraction", "threshold", "all", "none", "random"]))
    config = InterpolationLossConfig(
        positions=positions,
        fraction=data.draw(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9, 1.0])),
        threshold_nats=0.25 if positions == "threshold" else None,
        mismatch=data.draw(st.sampled_from(["absolute", "teacher_minus_student", "student_minus_teacher"])),
    )
    keys = data.draw(st.lists(st.integers(0, 2**128 - 1), min_size=len(lengths), max_size=len(lengths)))
    want = dense_selection(student, teacher, lengths, config, keys)
    assert _select(student, teacher, lengths, config, keys) == want.tolist()


def test_random_draws_depend_on_the_key_alone():
    config = InterpolationLossConfig(positions="random", fraction=0.3)
    together = _select(np.zeros(50), np.zeros(50), [20, 30], config, [5, 9])
    assert _select(np.zeros(20), np.zeros(20), [20], config, [5]) == together[:20]
    assert _select(np.zeros(50), np.zeros(50), [30, 20], config, [9, 5]) == together[20:] + together[:20]
    assert _select(np.zeros(20), np.zeros(20), [20], config, [6]) != together[:20]
    # The words of Philox are fixed by its paper: these positions may never change, or old runs could not be repeated.
    assert np.flatnonzero(together[:20]).tolist() == [2, 9, 10, 12, 13, 15]


def test_random_draws_are_even():
    """Over 2,000 keys each of 20 positions is drawn about 600 times: 6 standard deviations are 123."""
    config = InterpolationLossConfig(positions="random", fraction=0.3)
    drawn = _select(np.zeros(40_000), np.zeros(40_000), [20] * 2000, config, range(2000))
    counts = np.array(drawn).reshape(2000, 20).sum(0)
    assert np.abs(counts - 600).max() < 123


@pytest.mark.parametrize("keys", [None, [1], [1, -1], [1, 2**128], [1, 0.5], [1, True]])
def test_bad_keys_are_refused(keys):
    config = InterpolationLossConfig(positions="random")
    with pytest.raises(ValueError, match="rollout_keys: got"):
        _select(np.zeros(5), np.zeros(5), [2, 3], config, keys)
