"""Which responses of a step are trained on, and which response a teacher is shown, by their grades.

`rollout.keep=shortest_correct` and peers in place of solutions are those of OASIS (arXiv 2609.37915). The order of
equally long responses, and what happens without a peer, are ours.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_paint.records import LeftOut, Rollout

Keep = Literal["all", "correct", "shortest_correct"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What follows from the grades for one response."""

    correct: bool | None = None  # None: not graded
    left_out: LeftOut | None = None  # None: it is trained on
    peer: Rollout | None = None  # the response that its teacher is shown


def outcomes_of(
    rollouts: Sequence[Rollout],
    correct: Sequence[bool],
    *,
    keep: Keep,
    peers: bool,
    may_be_shown: Callable[[Rollout], bool] = lambda rollout: True,
) -> list[Outcome]:
    """Returns the outcome of each response of a step, in order.

    correct: the verdict on each. The shortest response has the fewest tokens; of equally long ones it is the one with
    the lowest sample index. peers: each response needs another right response to its problem, and the shortest one that
    may be shown is its peer; a response without one is left out.
    """
    right: dict[str, list[Rollout]] = {}
    for rollout, is_right in zip(rollouts, correct, strict=True):
        if is_right:
            right.setdefault(rollout.problem_id, []).append(rollout)
    ranked = {problem: sorted(found, key=_length) for problem, found in right.items()}
    outcomes = []
    for rollout, is_right in zip(rollouts, correct, strict=True):
        by_length = ranked.get(rollout.problem_id, [])
        left_out, peer = _refusal(rollout, is_right, by_length, keep=keep), None
        if peers and left_out is None:
            others = (other for other in by_length if other.sample_index != rollout.sample_index)
            peer = next(filter(may_be_shown, others), None)
            left_out = "no_peer" if peer is None else None
        outcomes.append(Outcome(correct=is_right, left_out=left_out, peer=peer))
    return outcomes


def outcome_metrics(outcomes: Sequence[Outcome], rollouts: Sequence[Rollout], *, peers: bool) -> dict[str, float]:
    """Returns the counts of a step: responses that are kept, problems without a right one, responses without a peer."""
    solved = {rollout.problem_id for rollout, outcome in zip(rollouts, outcomes, strict=True) if outcome.correct}
    problems = {rollout.problem_id for rollout in rollouts}
    counts = {
        "rollout/kept": float(sum(outcome.left_out is None for outcome in outcomes)),
        "rollout/problems_without_correct": float(len(problems - solved)),
    }
    if peers:
        counts["reveal/without_peer"] = float(sum(outcome.left_out == "no_peer" for outcome in outcomes))
    return counts


def _refusal(rollout: Rollout, is_right: bool, by_length: Sequence[Rollout], *, keep: Keep) -> LeftOut | None:
    """Returns why `rollout.keep` leaves a response out. by_length: the right responses, the shortest first."""
    if keep == "all":
        return None
    if not is_right:
        return "wrong"
    if keep == "shortest_correct" and rollout.sample_index != by_length[0].sample_index:
        return "not_shortest"
    return None


def _length(rollout: Rollout) -> tuple[int, int]:
    return len(rollout.response_ids), rollout.sample_index
