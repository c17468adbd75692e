"""The order of the training problems: shuffled epochs, or AdaSTaR's order, which follows verdicts on the rollouts.

AdaSTaR (arXiv 2505.16322) keeps all problems in a min-heap. The first key is the step of the last visit, the second one
the win rate of that visit: the share of right rollouts. A step takes the first m problems. After the step, the first
round(m a^2) of them are promoted: this step is their last visit, and they get their new win rates, so they move to the
end. a is the accuracy of the step. The others keep their keys, so they stay in front and the next step has them again.
A weak model thus repeats problems, and a strong one moves on.
"""

import heapq
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from megatron_paint.base.errors import UserError
from megatron_paint.base.keys import derive_key, permutation
from megatron_paint.data.problems import ProblemSet
from megatron_paint.records import Problem, Verdicts

if TYPE_CHECKING:
    from megatron_paint.config.settings import DataSettings


class ProblemOrder(Protocol):
    """Chooses the problems of each step.

    Every rank has one, calls it with the same arguments and gets the same results.
    """

    def batch(self, step: int) -> tuple[Problem, ...]:
        """Returns the problems of a step, over all ranks, and changes nothing. Steps count from 1 over the run."""

    def record(self, step: int, verdicts: Verdicts) -> dict[str, float]:
        """Updates the order with the verdicts on the rollouts of a completed step. Returns its metrics by their key.

        Not called for a step that was skipped.
        """

    def state_dict(self) -> dict[str, Any]:
        """Returns a copy of what a checkpoint must hold, in JSON's types. Empty: the order has no state."""

    def load_state_dict(self, state: Mapping[str, Any]) -> tuple[str, ...]:
        """Continues from what `state_dict` returned. Returns messages to the user."""


def problem_order(settings: "DataSettings", problems: ProblemSet) -> ProblemOrder:
    """Returns the order of `data.order`, before the first step."""
    match settings.order:
        case "shuffled":
            return ShuffledOrder(problems)
        case "adastar":
            return AdaStarOrder(problems)


@dataclass(frozen=True)
class ShuffledOrder:
    """The order of `data.order: shuffled`: a function of seed and step, without state."""

    problems: ProblemSet

    def batch(self, step: int) -> tuple[Problem, ...]:
        return self.problems.batch(step)

    def record(self, step: int, verdicts: Verdicts) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> tuple[str, ...]:
        return ()


class Visit(NamedTuple):
    """The last visit of a problem."""

    step: int
    right: int  # rollouts
    rollouts: int

    @property
    def win_rate(self) -> float:
        return self.right / self.rollouts


UNVISITED = (0, 0.0)  # last visit and win rate of a problem before its first visit


class AdaStarOrder:
    """The order of `data.order: adastar`. `batch` and `record` take O(m log n) for m of n problems.

    Problems with equal keys are ordered by a permutation whose key is `data.seed`. The number of promoted problems is
    computed from counts, without rounding errors.
    """

    def __init__(self, problems: ProblemSet):
        self._problems = problems.problems
        self._per_step = problems.problems_per_step
        self._index_at = permutation(derive_key("ties of problems", problems.seed), len(self._problems))
        self._visits: dict[str, Visit] = {}  # by problem id
        self._recorded = 0  # the last step
        self._heap = self._new_heap()

    def batch(self, step: int) -> tuple[Problem, ...]:
        if step < 1:
            raise ValueError(f"steps count from 1, not from {step}")
        first = [heapq.heappop(self._heap) for _ in range(self._per_step)]
        for entry in first:
            heapq.heappush(self._heap, entry)
        return tuple(self._problem_at(place) for _, _, place in first)

    def record(self, step: int, verdicts: Verdicts) -> dict[str, float]:
        """Promotes the first problems of the batch.

        verdicts: any number of rollouts of each problem of `batch(step)`, at least one. ValueError: other problems, or
        a step that does not follow the last recorded one.
        """
        batch = [problem.id for problem in self.batch(step)]
        if set(verdicts) != set(batch) or not all(map(len, verdicts.values())):
            raise ValueError(f"step {step} has verdicts on {sorted(verdicts)}, and its problems are {sorted(batch)}")
        if step <= self._recorded:
            raise ValueError(f"step {step} cannot be recorded after step {self._recorded}")
        right = sum(map(sum, verdicts.values()))
        rollouts = sum(map(len, verdicts.values()))
        promoted = [heapq.heappop(self._heap) for _ in range(num_promoted(len(batch), right=right, rollouts=rollouts))]
        for _, _, place in promoted:
            problem_id = self._problem_at(place).id
            visit = Visit(step, sum(verdicts[problem_id]), len(verdicts[problem_id]))
            self._visits[problem_id] = visit
            heapq.heappush(self._heap, (step, visit.win_rate, place))
        self._recorded = step
        oldest, _, _ = self._heap[0]
        return {"order/accuracy": right / rollouts, "order/promoted": len(promoted), "order/oldest_visit": oldest}

    def state_dict(self) -> dict[str, Any]:
        return {"rule": "adastar", "visits": {problem_id: list(visit) for problem_id, visit in self._visits.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> tuple[str, ...]:
        """Continues from a checkpoint's state; without a state no problem has a visit.

        Problems are compared by id. A problem that the state does not have is one without a visit. UserError: the state
        is not what `state_dict` returns.
        """
        if not state:
            return (
                "data.order=adastar begins without visits, because the checkpoint has none: it was written with "
                "another order of the problems",
            )
        try:
            visits = {str(name): Visit(*map(int, values)) for name, values in state["visits"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"the checkpoint's visits of data.order=adastar cannot be read ({error!r}): remove the checkpoint to "
                "resume from the one before it"
            ) from error
        self._recorded = max((visit.step for visit in visits.values()), default=0)
        known = {problem.id for problem in self._problems}
        self._visits = {name: visit for name, visit in visits.items() if name in known}
        self._heap = self._new_heap()
        if gone := len(visits) - len(self._visits):
            return (f"data.train no longer has {gone} of the {len(visits)} problems that the run has visited",)
        return ()

    def _new_heap(self) -> list[tuple[int, float, int]]:
        """All problems as (step of the last visit, win rate, place among problems with equal keys)."""
        heap = [(*UNVISITED, place) for place in range(len(self._problems))]
        if self._visits:
            places = np.argsort(self._index_at).tolist()
            for place, problem in zip(places, self._problems, strict=True):
                if (visit := self._visits.get(problem.id)) is not None:
                    heap[place] = (visit.step, visit.win_rate, place)
            heapq.heapify(heap)
        return heap

    def _problem_at(self, place: int) -> Problem:
        return self._problems[self._index_at[place]]


def num_promoted(problems: int, *, right: int, rollouts: int) -> int:
    """round(m a^2) of m problems, with the accuracy a = right / rollouts; a half is rounded to the even number.

    At least 1 (ours): a model that solves nothing would otherwise get the same batch for ever.
    """
    return max(1, round(Fraction(problems * right**2, rollouts**2)))
