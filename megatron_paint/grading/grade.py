r"""Is the answer in a response's last \boxed{} the right one?

Equal text is settled here; everything else is settled by math-verify in worker processes with a hard time limit, never
in a thread, where its alarm silently fails. Importing this file loads neither torch nor math-verify.
"""

import atexit
import os
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from megatron_paint.grading.boxes import last_box, last_boxes
from megatron_paint.grading.pool import Verdict, WorkerPool

__all__ = ["Grade", "GradingPool", "Rules", "answers_agree", "grade", "last_box", "normal_form", "same_text"]

Outcome = Literal["right", "wrong", "no_answer", "timeout"]
SECONDS = 5.0  # OPSD's limit
LONGEST = 2000  # characters of an answer that math-verify is asked about; longer ones are compared as text
TAIL = 8000  # characters of a response without a box that it is asked about; more would not fit into a pipe

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
    extracted: str | None  # what was compared with the answer; None without a box
    outcome: Outcome  # timeout: no verdict within the limits of time and memory, which is not a wrong answer


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """How generously answers are compared; the defaults are math-verify's own and are used everywhere."""

    require_box: bool = True  # False: a response without a box is handed to math-verify whole
    kinds: tuple[Literal["latex", "expr"], ...] = ("latex", "expr")  # what math-verify looks for
    precision: int = 6  # decimals that must agree
    strict: bool = True  # variables have names, and a set is not a tuple
    set_relation: bool = False  # a relation in the response may answer a set in the gold answer


DEFAULT_RULES = Rules()


def normal_form(text: str) -> str:
    """The text without spacing, sizes, dollar signs, text commands and final full stop: equal forms are equal answers.

    A space between letters or digits stays, because "1 2" is not 12. Parentheses around a lone number or letter go.
    """
    text = THIN_SPACE.sub("", text.strip().translate(MINUS))
    text = WIDE_SPACE.sub(" ", text)
    text = TEXT_COMMAND.sub(r" \1 ", DECORATION.sub("", text))
    text = FRACTION.sub(r"\\frac", text)
    text = LOOSE_SPACE.sub("", " ".join(text.split())).rstrip(".")
    alone = IN_PARENTHESES.fullmatch(text)
    return alone[1] if alone else text


def same_text(a: str, b: str) -> bool:
    """Equal in normal form, without regard to case where it is a word and not a formula."""
    a, b = normal_form(a), normal_form(b)
    return bool(a) and (a == b or (len(a) > 1 and a.isalpha() and a.casefold() == b.casefold()))


@dataclass(frozen=True, slots=True)
class _Case:
    """One comparison, settled or to be asked."""

    extracted: str | None
    agrees: bool | None  # None: math-verify is to be asked
    candidates: tuple[str, ...] = ()


def _prepare(candidates: Sequence[str], answer: str, *, longest: int = LONGEST) -> _Case:
    """Settle what text and integers settle; the first candidate is the one that is reported."""
    for candidate in candidates:
        if same_text(candidate, answer):
            return _Case(candidate, True)
    gold, given = normal_form(answer), normal_form(candidates[0])
    if len(candidates) == 1 and INTEGER.fullmatch(gold) and INTEGER.fullmatch(given):
        return _Case(candidates[0], int(gold) == int(given))
    short = tuple(candidate.translate(MINUS) for candidate in candidates if len(candidate) <= longest)
    if not short or not gold or len(answer) > LONGEST:
        return _Case(candidates[0], False)
    return _Case(candidates[0], None, short)


def _prepare_response(text: str, answer: str, rules: Rules) -> _Case:
    boxes = last_boxes(text)
    if not boxes:
        return _Case(None, False) if rules.require_box else _prepare([text[-TAIL:]], answer, longest=TAIL)
    candidates = [boxes[-1]] if len(boxes) == 1 else [boxes[-1], ", ".join(dict.fromkeys(boxes))]
    # A box is in math mode already: dollar signs in it, often unpaired as in "12 $ and $ 13", mislead the parser.
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
    """Grades many responses in `workers` processes, each verdict under a hard limit of `seconds` of wall time.

    A stuck or crashed worker is killed and replaced, and its item is a `timeout`. Workers start when one is needed and
    import neither torch nor megatron. Not to be shared by processes; threads wait for one another. on_verdict: called
    with each.
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
        """End the workers; a later call starts new ones."""
        with self._lock:
            self._pool.close()

    def grade(self, pairs: Iterable[tuple[str, str]], *, rules: Rules = DEFAULT_RULES) -> list[Grade]:
        """Grades of (response text, answer) pairs, in their order."""
        cases = [(_prepare_response(text, answer, rules), answer) for text, answer in pairs]
        return [_grade_of(case, verdict) for (case, _), verdict in zip(cases, self._ask(cases, rules), strict=True)]

    def agree(self, pairs: Iterable[tuple[str, str]], *, rules: Rules = DEFAULT_RULES) -> list[bool]:
        """Whether the two answers of each pair (given, gold) are equal; False, too, where no verdict is reached."""
        cases = [(_prepare([given], gold), gold) for given, gold in pairs]
        return [
            _grade_of(case, verdict).correct for (case, _), verdict in zip(cases, self._ask(cases, rules), strict=True)
        ]

    def _ask(self, cases: Sequence[tuple[_Case, str]], rules: Rules) -> list[Verdict | None]:
        """Verdicts for the cases that are not settled, None for the others."""
        options = {key: value for key, value in asdict(rules).items() if key != "require_box"}
        questions: list[dict[str, Any]] = [
            {"gold": answer, "candidates": case.candidates, **options} for case, answer in cases if case.agrees is None
        ]
        with self._lock:
            verdicts = iter(self._pool.judge(questions, seconds=self.seconds))
        return [next(verdicts) if case.agrees is None else None for case, _ in cases]


_shared: dict[tuple[int, float], GradingPool] = {}


def _shared_pool(seconds: float) -> GradingPool:
    """One worker for single questions, of this process: a fork must not read its parent's pipes."""
    key = (os.getpid(), seconds)
    if key not in _shared:
        _shared[key] = GradingPool(1, seconds)
        atexit.register(_shared[key].close)
    return _shared[key]


def grade(text: str, *, answer: str, rules: Rules = DEFAULT_RULES, seconds: float = SECONDS) -> Grade:
    r"""Grade the last \boxed{} of a response against the answer; what follows </think> is preferred.

    Boxes that stand together ("\boxed{3} and \boxed{5}") count as one answer if the last one alone is not right.
    No input hangs or crashes it. Many responses are graded faster by `GradingPool`.
    """
    return _shared_pool(seconds).grade([(text, answer)], rules=rules)[0]


def answers_agree(a: str, b: str, *, rules: Rules = DEFAULT_RULES, seconds: float = SECONDS) -> bool:
    """Whether answer a equals answer b, the gold one; False, too, where no verdict is reached."""
    return _shared_pool(seconds).agree([(a, b)], rules=rules)[0]
