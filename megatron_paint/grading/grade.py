r"""Is the answer in a response's last \boxed{} the right one?

Equal texts and integers are compared here. math-verify compares everything else in worker processes with a hard time
limit. It never runs in a thread, because its alarm silently fails there. Importing this file loads neither torch nor
math-verify.
"""

import atexit
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from megatron_paint.grading.boxes import find_boxes, last_boxes
from megatron_paint.grading.kinds import decide, reference
from megatron_paint.grading.normal_form import DOLLAR, normal_form, same_text
from megatron_paint.grading.pool import Verdict, WorkerPool
from megatron_paint.grading.thoughts import BoxInThought, answer_text, unfinished_thought

Outcome = Literal["right", "wrong", "no_answer", "timeout", "error"]
SECONDS = 5.0  # OPSD's limit
MAX_ANSWER_LENGTH = 2000  # characters; math-verify does not get longer answers, which are compared as text
TAIL_LENGTH = 8000  # characters that math-verify gets of a response without a box; more would not fit into a pipe


@dataclass(frozen=True, kw_only=True, slots=True)
class Grade:
    """The verdict on one response."""

    correct: bool
    extracted: str | None  # the text that was compared with the answer; None without a box
    # timeout: no verdict within the limits of time and memory; error: a user's function failed. Both are counted
    # separately from wrong.
    outcome: Outcome
    box_in_thought: bool = False  # a thought that never ends holds a box; `Rules.box_in_thought` says whether it counts
    score: float | None = None  # of a user's function, in [0, 1]; None: another grader, or no verdict
    error: str = ""  # why there is no verdict, where the outcome is error

    @property
    def reward(self) -> float:
        """The reward in GRPO, in [0, 1]: the score of a user's function, else 1 for a right answer and 0 for others."""
        return float(self.correct) if self.score is None else self.score


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """How generously answers are found and compared. Every part of the package uses the defaults.

    The defaults of kinds, precision, strict and set_relation are math-verify's.
    """

    box_in_thought: BoxInThought = (
        "ignore"  # `grading.box_in_thought`: whether a box counts in a thought without an end
    )
    require_box: bool = True  # False: math-verify gets the text of a response without a box
    kinds: tuple[Literal["latex", "expr"], ...] = ("latex", "expr")  # what math-verify looks for
    precision: int = 6  # decimals that must agree
    strict: bool = True  # False: other names of variables are allowed, so x+1 equals y+1
    set_relation: bool = False  # a relation in the response may answer a set in the gold answer


DEFAULT_RULES = Rules()


@dataclass(frozen=True, slots=True)
class _Case:
    """One comparison that is either decided or still a question to math-verify."""

    extracted: str | None
    agrees: bool | None  # None: math-verify decides
    gold: str = ""
    candidates: tuple[str, ...] = ()
    prose: bool = False  # the candidate is a response without a box


def _prepare(candidates: Sequence[str], answer: str, rules: Rules) -> _Case:
    """Decides the comparison where math-verify is not needed. The first candidate is the extracted one."""
    gold = reference(answer)
    open_candidates = []
    for candidate in candidates:
        if same_text(candidate, gold):
            return _Case(candidate, True)
        if max(len(candidate), len(gold)) <= MAX_ANSWER_LENGTH and normal_form(gold):
            verdict = decide(gold, candidate, precision=rules.precision)
            if verdict is True:
                return _Case(candidate, True)
            if verdict is not False:
                open_candidates.append(candidate)
    return _Case(candidates[0], None if open_candidates else False, gold, tuple(open_candidates))


def _prepare_prose(text: str, answer: str) -> _Case:
    """The question whether math-verify finds the answer in a response without a box."""
    gold, text = reference(answer), text[-TAIL_LENGTH:]
    if same_text(text, gold):
        return _Case(text, True)
    if not text.strip() or not normal_form(gold) or len(gold) > MAX_ANSWER_LENGTH:
        return _Case(text, False)
    return _Case(text, None, gold, (text,), prose=True)


def _prepare_response(text: str, answer: str, rules: Rules) -> _Case:
    boxes = last_boxes(answer_text(text, rules.box_in_thought))
    if not boxes:
        return _Case(None, False) if rules.require_box else _prepare_prose(text, answer)
    candidates = [boxes[-1]] if len(boxes) == 1 else [boxes[-1], ", ".join(dict.fromkeys(boxes))]
    # A box is in math mode. Dollar signs in it are often unpaired, as in "12 $ and $ 13", and mislead the parser.
    return _prepare(candidates + [DOLLAR.sub(" ", text) for text in candidates if DOLLAR.search(text)], answer, rules)


def _grade_of(case: _Case, verdict: Verdict | None) -> Grade:
    if case.extracted is None:
        return Grade(correct=False, extracted=None, outcome="no_answer")
    if verdict is not None and verdict.timed_out:
        return Grade(correct=False, extracted=case.extracted, outcome="timeout")
    if case.agrees:
        return Grade(correct=True, extracted=case.extracted, outcome="right")
    if verdict is not None and verdict.agrees is not None:
        return Grade(correct=True, extracted=case.candidates[verdict.agrees], outcome="right")
    return Grade(correct=False, extracted=case.extracted, outcome="wrong")


def box_in_unfinished_thought(text: str) -> bool:
    """Tells whether a thought that never ends holds a box."""
    start = unfinished_thought(text)
    return start is not None and bool(find_boxes(text[start:]))


class GradingPool:
    """Grades many responses in `workers` processes. Each verdict has a hard limit of `seconds` of wall time.

    A worker that hangs or crashes is killed and replaced. The outcome of its response is `timeout`. Workers start when
    they are needed. They import neither torch nor megatron. Threads may share a pool; then they wait for each other.
    Processes must not share one. rules: for calls that name none. on_verdict: called after each verdict of a worker.
    """

    def __init__(
        self,
        workers: int | None = None,
        seconds: float = SECONDS,
        *,
        rules: Rules = DEFAULT_RULES,
        on_verdict: Callable[[], None] = lambda: None,
    ) -> None:
        self.seconds, self.rules = seconds, rules
        self._pool = WorkerPool(workers or min(8, os.cpu_count() or 1), on_verdict=on_verdict)
        self._lock = threading.Lock()

    def __enter__(self) -> "GradingPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers. A later call starts new ones."""
        with self._lock:
            self._pool.close()

    def grade(self, pairs: Iterable[tuple[str, str]], *, rules: Rules | None = None) -> list[Grade]:
        """Returns the grade of each (response text, answer) pair, in the order of the pairs."""
        rules, pairs = rules or self.rules, list(pairs)
        cases = [_prepare_response(text, answer, rules) for text, answer in pairs]
        return [
            replace(_grade_of(case, verdict), box_in_thought=box_in_unfinished_thought(text))
            for (text, _), case, verdict in zip(pairs, cases, self._ask(cases, rules), strict=True)
        ]

    def agree(self, pairs: Iterable[tuple[str, str]], *, rules: Rules | None = None) -> list[bool]:
        """Tells for each pair (given answer, gold answer) whether they are equal. Without a verdict it is False."""
        rules = rules or self.rules
        cases = [_prepare([given], gold, rules) for given, gold in pairs]
        return [_grade_of(case, verdict).correct for case, verdict in zip(cases, self._ask(cases, rules), strict=True)]

    def _ask(self, cases: Sequence[_Case], rules: Rules) -> list[Verdict | None]:
        """Returns math-verify's verdict for the cases that are not decided, and None for the others."""
        options = {key: value for key, value in asdict(rules).items() if key not in ("require_box", "box_in_thought")}
        questions: list[dict[str, Any]] = [
            {"gold": case.gold, "candidates": case.candidates, "prose": case.prose, **options}
            for case in cases
            if case.agrees is None
        ]
        with self._lock:
            verdicts = iter(self._pool.judge(questions, seconds=self.seconds))
        return [next(verdicts) if case.agrees is None else None for case in cases]


_shared: dict[tuple[int, float], GradingPool] = {}


def _shared_pool(seconds: float) -> GradingPool:
    """Returns this process's pool of one worker for single questions. A fork must not read its parent's pipes."""
    key = (os.getpid(), seconds)
    if key not in _shared:
        _shared[key] = GradingPool(1, seconds)
        atexit.register(_shared[key].close)
    return _shared[key]


def grade(text: str, *, answer: str, rules: Rules = DEFAULT_RULES, seconds: float = SECONDS) -> Grade:
    r"""Compares the last \boxed{} of a response with the answer. A box after </think> is preferred.

    Neighbouring boxes ("\boxed{3} and \boxed{5}") count as one answer if the last box alone is not right. No input can
    make the call hang or crash. seconds: time limit of the comparison. `GradingPool` grades many responses faster.
    Raises UserError if math-verify is not installed.
    """
    return _shared_pool(seconds).grade([(text, answer)], rules=rules)[0]


def answers_agree(a: str, b: str, *, rules: Rules = DEFAULT_RULES, seconds: float = SECONDS) -> bool:
    """Tells whether answer a equals answer b, the gold answer. It is False if there is no verdict within `seconds`."""
    return _shared_pool(seconds).agree([(a, b)], rules=rules)[0]
