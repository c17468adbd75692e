"""Which responses are trained on and which one a teacher is shown: every rule by hand."""

import pytest

from megatron_paint.records import Rollout
from megatron_paint.rollouts.outcomes import outcome_metrics, outcomes_of


def rollouts_of(**lengths):
    """The responses of each problem, of so many tokens."""
    return [
        Rollout(problem_id=problem, sample_index=index, prompt_ids=(1,), response_ids=(5,) * length)
        for problem, found in lengths.items()
        for index, length in enumerate(found)
    ]


# Three problems with four responses each: right ones of 9, 4 and 4 tokens; one right one; none.
ROLLOUTS = rollouts_of(a=(9, 4, 2, 4), b=(3, 7, 5, 1), c=(2, 2, 2, 2))
CORRECT = [True, True, False, True, False, True, False, False, False, False, False, False]


def left_out(keep, *, peers=False, **options):
    outcomes = outcomes_of(ROLLOUTS, CORRECT, keep=keep, peers=peers, **options)
    assert [outcome.correct for outcome in outcomes] == CORRECT
    return [outcome.left_out for outcome in outcomes]


def peers_of(keep, **options):
    """By place: the sample index of the peer."""
    outcomes = outcomes_of(ROLLOUTS, CORRECT, keep=keep, peers=True, **options)
    for rollout, outcome in zip(ROLLOUTS, outcomes, strict=True):
        if outcome.peer is not None:
            assert outcome.left_out is None
            assert outcome.peer.problem_id == rollout.problem_id
            assert outcome.peer.sample_index != rollout.sample_index
    return {place: outcome.peer.sample_index for place, outcome in enumerate(outcomes) if outcome.peer is not None}


def test_all():
    assert left_out("all") == [None] * 12


def test_correct():
    assert left_out("correct") == [None, None, "wrong", None, "wrong", None, *["wrong"] * 6]


def test_of_equally_long_responses_the_first_is_the_shortest():
    expected = ["not_shortest", None, "wrong", "not_shortest", "wrong", None, *["wrong"] * 6]
    assert left_out("shortest_correct") == expected


def test_a_peer_is_the_shortest_other_right_response():
    # Of problem a, sample 1 is the shortest right one. It is shown sample 3 itself. Wrong responses are shown it too.
    # Of problem b, sample 1 alone is right: it is the peer of all others and has none.
    assert peers_of("all") == {0: 1, 1: 3, 2: 1, 3: 1, 4: 1, 6: 1, 7: 1}
    assert left_out("all", peers=True) == [*[None] * 5, "no_peer", None, None, *["no_peer"] * 4]
    assert peers_of("correct") == {0: 1, 1: 3, 3: 1}
    assert peers_of("shortest_correct") == {1: 3}
    expected = ["not_shortest", None, "wrong", "not_shortest", "wrong", "no_peer", *["wrong"] * 6]
    assert left_out("shortest_correct", peers=True) == expected


def test_a_response_that_may_not_be_shown_is_no_peer():
    def long_enough(rollout):
        return len(rollout.response_ids) > 4

    assert peers_of("correct", may_be_shown=long_enough) == {1: 0, 3: 0}
    assert left_out("correct", peers=True, may_be_shown=long_enough)[0] == "no_peer"


def test_the_order_of_the_responses_has_no_influence():
    backward = outcomes_of(ROLLOUTS[::-1], CORRECT[::-1], keep="shortest_correct", peers=True)
    assert backward[::-1] == outcomes_of(ROLLOUTS, CORRECT, keep="shortest_correct", peers=True)


@pytest.mark.parametrize(
    ("keep", "peers", "kept", "without_peer"),
    [
        ("all", False, 12, None),
        ("correct", False, 4, None),
        ("shortest_correct", False, 2, None),
        ("all", True, 7, 5),
        ("correct", True, 3, 1),
        ("shortest_correct", True, 1, 1),
    ],
)
def test_counts(keep, peers, kept, without_peer):
    outcomes = outcomes_of(ROLLOUTS, CORRECT, keep=keep, peers=peers)
    metrics = outcome_metrics(outcomes, ROLLOUTS, peers=peers)
    expected = {"rollout/kept": kept, "rollout/problems_without_correct": 1}
    if peers:
        expected["reveal/without_peer"] = without_peer
    assert metrics == expected
