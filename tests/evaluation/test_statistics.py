"""Figures of an evaluation against numbers worked by hand and against scipy."""

import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats

from megatron_paint.base.errors import UserError
from megatron_paint.evaluation.statistics import (
    build_report,
    macro_average,
    macro_difference,
    majority_score,
    mean_interval,
    paired_difference,
    pass_at_k,
    sign_flip_p_value,
)
from megatron_paint.records import Graded

OUTCOMES = {"r": "right", "w": "wrong", "n": "no_answer", "t": "timeout"}


def graded(problem, marks, *, answers=None, tokens=10, finished=True):
    """Makes one Graded for each letter of `marks`: r, w, n, t."""
    return [
        Graded(
            problem_id=problem,
            sample_index=index,
            response_text="",
            num_tokens=tokens,
            finished=finished,
            outcome=OUTCOMES[mark],
            extracted=None if mark == "n" else (answers[index] if answers else mark),
        )
        for index, mark in enumerate(marks)
    ]


def test_pass_at_k_by_hand():
    # C(1,2) = 0 ways to miss with both of 2; 3 of C(4,2) = 6 pairs of {r, w, w, w} hold no right one.
    assert pass_at_k(1, 4, 1) == pytest.approx(1 / 4)
    assert pass_at_k(1, 4, 2) == pytest.approx(1 - 3 / 6)
    assert pass_at_k(3, 4, 2) == 1.0
    assert pass_at_k(0, 4, 4) == 0.0
    assert pass_at_k(2, 12, 3) == pytest.approx(1 - 120 / 220)  # C(10,3), C(12,3)


@pytest.mark.parametrize(("right", "samples", "k"), [(0, 4, 5), (0, 4, 0), (5, 4, 1)])
def test_pass_at_k_refuses(right, samples, k):
    with pytest.raises(ValueError, match="pass@k"):
        pass_at_k(right, samples, k)


def test_pass_at_k_is_the_mean_over_all_subsets():
    from itertools import combinations

    marks = [1, 1, 0, 0, 0]
    for k in range(1, 6):
        subsets = [any(subset) for subset in combinations(marks, k)]
        assert pass_at_k(2, 5, k) == pytest.approx(sum(subsets) / len(subsets))


@pytest.mark.parametrize(
    ("marks", "answers", "score"),
    [
        ("rrw", ["5", "5", "6"], 1.0),
        ("rww", ["5", "6", "6"], 0.0),
        ("rw", ["5", "6"], 0.5),  # a tie of two
        ("rwt", ["5", "6", "7"], 1 / 3),
        ("rrww", ["1/2", "0.5", "6", "7"], 1.0),  # right answers are one however written
        ("rww", ["5", r"\dfrac{1}{3}", r"\frac{1}{3}"], 0.0),  # so are wrong ones of one normal form
        ("rnn", ["5", None, None], 1.0),  # no answer is no vote
        ("nn", None, 0.0),
    ],
)
def test_majority(marks, answers, score):
    assert majority_score(graded("p", marks, answers=answers)) == pytest.approx(score)


def test_report_by_hand():
    answers = (
        graded("a", "rrrr", tokens=10)
        + graded("b", "rwwn", tokens=20, answers=["1", "2", "3", None])
        + graded("c", "wtnn", tokens=60, finished=False, answers=["1", "2", None, None])
    )
    report = build_report(25, "tiny", answers, greedy=graded("a", "r", tokens=8) + graded("b", "w", tokens=12))
    metrics = report.metrics
    assert (report.step, report.benchmark, report.num_problems, report.samples_per_problem) == (25, "tiny", 3, 4)
    assert metrics["avg"] == metrics["pass@1"] == pytest.approx((1 + 1 / 4 + 0) / 3)
    assert metrics["pass@2"] == pytest.approx((1 + 1 / 2 + 0) / 3)
    assert metrics["pass@4"] == pytest.approx(2 / 3)
    assert metrics["maj@4"] == pytest.approx((1 + 1 / 3 + 0) / 3)
    assert metrics["truncated_share"] == pytest.approx(4 / 12)
    assert metrics["no_answer_share"] == pytest.approx(3 / 12)
    assert metrics["length_mean"] == pytest.approx(30)
    assert metrics["timeouts"] == 1
    assert metrics["greedy"] == 0.5
    assert metrics["greedy/length_mean"] == 10
    # p (1 - p) / (n - 1) = 3/16/3 for b, 0 for the others; then over 3 problems.
    assert metrics["avg/sampling_se"] == pytest.approx(math.sqrt(3 / 16 / 3) / 3)
    assert metrics["avg/problem_se"] == pytest.approx(np.std([1, 0.25, 0], ddof=1) / math.sqrt(3))
    assert 0 <= metrics["avg/low"] < metrics["avg"] < metrics["avg/high"] <= 1
    assert [answer.sample_index for answer in report.answers[-2:]] == [-1, -1]


def test_boxes_in_unfinished_thoughts_are_counted():
    answers = [replace(answer, box_in_thought=True) for answer in graded("a", "nnr")] + graded("b", "rww")
    assert build_report(0, "tiny", answers).metrics["box_in_thought"] == 3


def test_report_with_one_sample_has_no_sampling_error():
    report = build_report(0, "tiny", graded("a", "r"))
    assert report.metrics["avg"] == report.metrics["avg/high"] == 1.0
    assert report.metrics["avg/low"] == pytest.approx(0.025)  # of one problem, a share of 2.5 % is right so often
    assert "avg/sampling_se" not in report.metrics
    assert "avg/problem_se" not in report.metrics
    assert all(math.isfinite(value) for value in report.metrics.values())


def test_report_refuses_uneven_and_no_samples():
    with pytest.raises(ValueError, match="same number of samples"):
        build_report(0, "tiny", graded("a", "rr") + graded("b", "r"))
    with pytest.raises(ValueError, match="same number of samples"):
        build_report(0, "tiny", [])


def test_interval_is_that_of_the_binomial():
    """100 problems, half of them right: the bootstrap draws Binomial(100, 1/2)/100, whose 2.5 % point is 0.40."""
    scores = np.array([0.0, 1.0] * 50)
    interval = mean_interval([scores], key="x")
    assert interval.mean == 0.5
    assert interval.low == pytest.approx(0.40, abs=0.011)
    assert interval.high == pytest.approx(0.60, abs=0.011)
    assert mean_interval([scores], key="x") == interval
    assert mean_interval([scores], key="x", level=0.5).low > interval.low


def test_interval_covers_the_truth_about_as_often_as_its_level():
    generator = np.random.default_rng(0)
    covered = 0
    for number in range(60):
        interval = mean_interval([generator.binomial(12, 0.4, size=60) / 12], key=str(number))
        covered += interval.low <= 0.4 <= interval.high
    assert 51 <= covered <= 60  # 95 % of 60 is 57, minus 3.5 standard deviations


@pytest.mark.parametrize("problems", [1, 2, 30, 500])
@pytest.mark.parametrize("level", [0.5, 0.95])
def test_interval_where_all_problems_are_right_or_none_is(problems, level):
    """Redrawing problems gives no spread. The interval is the exact one of the binomial distribution."""
    for score in (0, 1):
        found = mean_interval([np.full(problems, float(score))], key="x", level=level)
        exact = scipy.stats.binomtest(score * problems, problems).proportion_ci(level, method="exact")
        assert found.mean == score
        assert (found.low, found.high) == pytest.approx((exact.low, exact.high), abs=1e-12)
        assert min(max(found.low, 0.0), 1.0) == found.low  # no rounding below 0 or above 1
        assert min(max(found.high, 0.0), 1.0) == found.high


def test_interval_where_all_scores_are_equal():
    """At least 0.025^(1/10) = 0.6915 of all problems have the score 1/3. The others may have any score."""
    found = mean_interval([np.full(10, 1 / 3)], key="x")
    assert (found.low, found.high) == pytest.approx((0.6915 / 3, 0.6915 / 3 + 0.3085), abs=1e-4)
    half = np.array([0.0, 1.0] * 50)  # [0.40, 0.60], as above
    found = mean_interval([np.zeros(30), half], key="x")  # [0, 0.1157], as of 30 problems none of which is right
    assert (found.low, found.high) == pytest.approx((0.40 / 2, 0.60 / 2 + 0.1157 / 2), abs=0.006)


def test_difference_where_no_problem_changes():
    before = build_report(0, "x", [g for i in range(30) for g in graded(str(i), "ww")])
    found = paired_difference(before=before, after=before)
    assert (found.mean, found.low, found.high) == pytest.approx((0, -0.1157, 0.1157), abs=1e-4)


def test_paired_difference_by_hand():
    before = build_report(0, "tiny", graded("a", "rw") + graded("b", "ww") + graded("c", "rr"))
    after = build_report(100, "tiny", graded("c", "rr") + graded("a", "rr") + graded("b", "wr"))  # another order
    found = paired_difference(before=before, after=after)
    assert found.mean == pytest.approx((0.5 + 0.5 + 0) / 3)
    assert 0 <= found.low < found.mean < found.high <= 0.5
    assert paired_difference(before=after, after=before).mean == pytest.approx(-found.mean)


def test_pairing_removes_the_spread_between_problems():
    """Every problem except one gains one sample in four. The difference is almost certain; the scores vary widely."""
    marks = ["wwww", "rwww", "rrww", "rrrw"] * 5 + ["rrrr"]
    gains = [mark.replace("w", "r", 1) for mark in marks]
    before = build_report(0, "x", [g for i, mark in enumerate(marks) for g in graded(str(i), mark)])
    after = build_report(1, "x", [g for i, mark in enumerate(gains) for g in graded(str(i), mark)])
    found = paired_difference(before=before, after=after)
    assert found.mean == pytest.approx(0.25 * 20 / 21)
    assert found.high == 0.25
    assert found.high - found.low < 0.05
    assert after.metrics["avg/high"] - after.metrics["avg/low"] > 0.15


def test_greedy_answers_take_no_part_in_a_comparison():
    plain = build_report(0, "x", graded("a", "rw"))
    with_greedy = build_report(1, "x", graded("a", "rw"), greedy=graded("a", "w"))
    assert paired_difference(before=plain, after=with_greedy).mean == 0


def test_different_problems_or_benchmarks_are_refused():
    one, other = build_report(0, "x", graded("a", "r")), build_report(0, "x", graded("b", "r"))
    with pytest.raises(UserError, match=r"same problems.*'a'"):
        paired_difference(before=one, after=other)
    with pytest.raises(UserError, match="same benchmarks"):
        paired_difference(before=one, after=build_report(0, "y", graded("a", "r")))


def test_macro_average_weighs_benchmarks_and_not_problems():
    small = build_report(0, "small", graded("a", "r"))
    large = build_report(0, "large", graded("b", "w") + graded("c", "w") + graded("d", "r"))
    assert macro_average([small, large]).mean == pytest.approx((1 + 1 / 3) / 2)
    better = build_report(1, "large", graded("b", "r") + graded("c", "w") + graded("d", "r"))
    assert macro_difference(before=[small, large], after=[small, better]).mean == pytest.approx(1 / 6)


def test_pass_at_k_and_intervals_against_scipy():
    generator = np.random.default_rng(3)
    scores = generator.integers(0, 13, size=90) / 12
    ours = mean_interval([scores], key="any")
    theirs = scipy.stats.bootstrap((scores,), np.mean, n_resamples=20_000, method="percentile", rng=generator)
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=0.01)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=0.01)
    for right in range(13):
        for k in (1, 3, 12):
            assert pass_at_k(right, 12, k) == pytest.approx(1 - scipy.stats.hypergeom(12, right, k).pmf(0))


@pytest.mark.parametrize(("problems", "shift"), [(8, 0.2), (12, 0.05), (60, 0.05), (300, 0.0)])
def test_p_values_against_scipy(problems, shift):
    generator = np.random.default_rng(problems)
    differences = generator.integers(-4, 5, size=problems) / 12 + shift
    theirs = scipy.stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=100_000, rng=generator
    )
    assert sign_flip_p_value([differences], key="k") == pytest.approx(theirs.pvalue, abs=0.006)


def test_p_values_at_the_ends():
    assert sign_flip_p_value([np.array([0.1, 0.2, -0.3])], key="k") == 1.0  # a sum of 0, except for rounding
    assert sign_flip_p_value([np.zeros(40)], key="k") == 1.0
    assert sign_flip_p_value([np.full(10, 0.1)], key="k") == 2 / 2**10
    assert sign_flip_p_value([np.full(50, 0.1)], key="k") == 1 / 100_001
    assert sign_flip_p_value([np.full(5, 0.1), np.zeros(7)], key="k") == 2 / 2**5
