"""AdaSTaR's rule without a heap: a table that is sorted in each step, with exact fractions."""

from collections.abc import Mapping, Sequence
from fractions import Fraction

from megatron_paint.data.order import AdaStarOrder
from megatron_paint.data.problems import ProblemSet
from megatron_paint.records import Problem


def first_order(ids: Sequence[str], seed: int = 1) -> list[str]:
    """All problems in the order of their first visit, which decides between equal keys."""
    problems = tuple(Problem(id=name, problem="p", solution="s", answer="a") for name in ids)
    return [problem.id for problem in AdaStarOrder(ProblemSet(problems, len(ids), seed)).batch(1)]


class NaiveOrder:
    """ids: in the order of `first_order`."""

    def __init__(self, ids: Sequence[str], per_step: int):
        self.places = {name: place for place, name in enumerate(ids)}
        self.per_step = per_step
        self.visits = {name: (0, 0, 1) for name in ids}  # step, right rollouts, rollouts

    def key(self, name: str) -> tuple[int, Fraction, int]:
        step, right, rollouts = self.visits[name]
        return step, Fraction(right, rollouts), self.places[name]

    def batch(self) -> list[str]:
        """The problems of the coming step."""
        return sorted(self.visits, key=self.key)[: self.per_step]

    def record(self, step: int, verdicts: Mapping[str, Sequence[bool]]) -> int:
        """The number of promoted problems."""
        batch = self.batch()
        votes = [vote for name in batch for vote in verdicts[name]]
        number, rest = divmod(self.per_step * votes.count(True) ** 2, len(votes) ** 2)
        if 2 * rest > len(votes) ** 2 or (2 * rest == len(votes) ** 2 and number % 2):
            number += 1
        number = max(number, 1)
        for name in batch[:number]:
            self.visits[name] = (step, sum(verdicts[name]), len(verdicts[name]))
        return number

    @property
    def visited(self) -> dict[str, list[int]]:
        """What a checkpoint has of the order."""
        return {name: list(visit) for name, visit in self.visits.items() if visit[0]}

    @property
    def oldest(self) -> int:
        """The step of the oldest last visit."""
        return min(step for step, _, _ in self.visits.values())
