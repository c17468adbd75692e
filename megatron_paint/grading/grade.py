r"""Is the answer in a response's last \boxed{} the right one?

Equal texts and integers are compared here. math-verify compares everything else in worker processes with a hard time
limit. It never runs in a thread, because its alarm silently fails there. Importing this file loads neither torch nor
math-verify.
"""

import atexit
import os
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from megatron_paint.grading.boxes import last_boxes
from megatron_paint.grading.pool import Verdict, WorkerPool

Outcome = Literal["right", "wrong", "no_answer", "timeout"]
SECONDS = 5.0  # OPSD's limit
MAX_ANSWER_LENGTH = 2000  # characters; math-verify does not get longer answers, which are compared as text
TAIL_LENGTH = 8000  # characters that math-verify gets of a response without a box; more would not fit into a pipe

THIN_SPACE = re.compile(r"\\[,!]|\{,\}(?=\d)")
WIDE_SPACE = re.compile(r"\\(?:[;: ~]|q?quad(?![A-Za-z]))|~")
DECORATION = re.compile(r"\\(?:left|right|displaystyle|limits)(?![A-Za-z])|\\\$|\$")
TEXT_COMMAND = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
FRACTION = re.compile(r"\\[dtc]frac(?![A-Za-z])")
MINUS = str.maketrans({"\N{MINUS SIGN}": "-"})
LOOSE_SPACE = re.compile(r"(?<![0-9A-Za-z]) | (?![0-9A-Za-z])")  # of single spaces
IN_PARENTHESES = re.compile(r"\(([0-9]+|[A-Za-z])\)")
DOLLAR = re.compile(r"(?<!\\)\$")
INTEGER = re.compile(r"-?[0-9]{1,100}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Grade:
    """The verdict on one response."""

    correct: bool
    extracted: str | None  # the text that was compared with the answer; None without a box
    outcome: Outcome  # timeout: no verdict within the limits of time and memory; counted separately from wrong


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """How generously answers are compared. The defaults are math-verify's. Every part of the package uses them."""

    require_box: bool = True  # False: math-verify gets the text of a response without a box
    kinds: tuple[Literal["latex", "expr"], ...] = ("latex", "expr")  # what math-verify looks for
    precision: int = 6  # decimals that must agree
    strict: bool = True  # variables have names, and a set is not a tuple
    set_relation: bool = False  # a relation in the response may answer a set in the gold answer


DEFAULT_RULES = Rules()


def normal_form(text: str) -> str:
    """Returns the text without spacing, sizes, dollar signs, text commands and final full stop.

    Answers with equal forms are equal. A space between letters or digits is kept, because "1 2" is not 12. Parentheses
    around a single number or letter are removed.
    """
    text = THIN_SPACE.sub("", text.strip().translate(MINUS))
    text = WIDE_SPACE.sub(" ", text)
    text = TEXT_COMMAND.sub(r" \1 ", DECORATION.sub("", text))
    text = FRACTION.sub(r"\\frac", text)
    text = LOOSE_SPACE.sub("", " ".join(text.split())).rstrip(".")
    alone = IN_PARENTHESES.fullmatch(text)
    return alone[1] if alone else text


def same_text(a: str, b: str) -> bool:
    """Tells whether two answers have the same normal form. The case of letters matters in formulas, not in words."""
    a, b = normal_form(a), normal_form(b)
    return bool(a) and (a == b or (len(a) > 1 and a.isalpha() and a.casefold() == b.casefold()))


@dataclass(frozen=True, slots=True)
class _Case:
    """One comparison that is either decided or still a question to math-verify."""

    extracted: str | None
    agrees: bool | None  # None: math-verify decides
    candidates: tuple[str, ...] = ()


def _prepare(candidates: Sequence[str], answer: str, *, max_length: int = MAX_ANSWER_LENGTH) -> _Case:
    """Decides the comparison where equal texts or integers are enough. The first candidate is the extracted one."""
    for candidate in candidates:
        if same_text(candidate, answer):
            return _Case(candidate, True)
    gold, given = normal_form(answer), normal_form(candidates[0])
    if len(candidates) == 1 and INTEGER.fullmatch(gold) and INTEGER.fullmatch(given):
        return _Case(candidates[0], int(gold) == int(given))
    short = tuple(candidate.translate(MINUS) for candidate in candidates if len(candidate) <= max_length)
    if not short or not gold or len(answer) > MAX_ANSWER_LENGTH:
        return _Case(candidates[0], False)
    return _Case(candidates[0], None, short)


def _prepare_response(text: str, answer: str, rules: Rules) -> _Case:
    boxes = last_boxes(text)
    if not boxes:
        if rules.require_box:
            return _Case(None, False)
        return _prepare([text[-TAIL_LENGTH:]], answer, max_length=TAIL_LENGTH)
    candidates = [boxes[-1]] if len(boxes) == 1 else [boxes[-1], ", ".join(dict.fromkeys(boxes))]
    # A box is in math mode. Dollar signs in it are often unpaired, as in "12 $ and $ 13", and mislead the parser.
    return _prepare(candidates + [DOLLAR.sub(" ", text) for text in candidates if DOLLAR.search(text)], answer)


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


class GradingPool:
    """Grades many responses in `workers` processes. Each verdict has a hard limit of `seconds` of wall time.

    A worker that hangs or crashes is killed and replaced. The outcome of its response is `timeout`. Workers start when
    they are needed. They import neither torch nor megatron. Threads may share a pool; then they wait for each other.
    Processes must not share one. on_verdict: called after each verdict of a worker.
    """

    def __init__(
        self, workers: int | None = None, seconds: float = SECONDS, *, on_verdict: Callable[[], None] = lambda: None
    ) -> None:
        self.seconds = seconds
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

    def grade(self, pairs: Iterable[tuple[str, str]], *, rules: Rules = DEFAULT_RULES) -> list[Grade]:
        """Returns the grade of each (response text, answer) pair, in the order of the pairs."""
        cases = [(_prepare_response(text, answer, rules), answer) for text, answer in pairs]
        return [_grade_of(case, verdict) for (case, _), verdict in zip(cases, self._ask(cases, rules), strict=True)]

    def agree(self, pairs: Iterable[tuple[str, str]], *, rules: Rules = DEFAULT_RULES) -> list[bool]:
        """Tells for each pair (given answer, gold answer) whether they are equal. Without a verdict it is False."""
        cases = [(_prepare([given], gold), gold) for given, gold in pairs]
        return [
            _grade_of(case, verdict).correct for (case, _), verdict in zip(cases, self._ask(cases, rules), strict=True)
        ]

    def _ask(self, cases: Sequence[tuple[_Case, str]], rules: Rules) -> list[Verdict | None]:
        """Returns math-verify's verdict for the cases that are not decided, and None for the others."""
        options = {key: value for key, value in asdict(rules).items() if key != "require_box"}
        questions: list[dict[str, Any]] = [
            {"gold": answer, "candidates": case.candidates, **options} for case, answer in cases if case.agrees is None
        ]
        with self._lock:
            verdicts = iter(self._pool.judge(questions, seconds=self.seconds))
        return [next(verdicts) if case.agrees is None else None for case, _ in cases]


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
