"""Problems with verified solutions. The batch of a step is a function of (seed, step).

Every row is checked when it is read. An error names a bad row by file and line.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_paint.base.errors import UserError
from megatron_paint.base.keys import derive_key, permutation
from megatron_paint.data.rows import Row, nearest, read_rows
from megatron_paint.grading.boxes import last_box
from megatron_paint.grading.grade import Grade
from megatron_paint.grading.normal_form import same_text
from megatron_paint.records import Problem

if TYPE_CHECKING:
    from megatron_paint.config.settings import ColumnSettings, DataSettings, EvaluationSettings

REASONS_SHOWN = 3
DEFAULT_ID_COLUMN = "id"
LARGEST_EXACT_FLOAT = 2**53


Grader = Callable[..., Grade]  # grade(text, answer=...)


@dataclass(frozen=True, kw_only=True)
class PromptLimit:
    """How long a problem's prompts may be."""

    length: Callable[[Problem], int]  # returns the tokens of a problem's longest prompt
    most: int  # tokens
    reason: str  # the origin of `most`, for the error message


@dataclass(frozen=True, kw_only=True)
class LoadedProblems:
    """The good rows of a source, in the order of the source."""

    problems: tuple[Problem, ...]
    bad_rows: tuple[str, ...] = ()  # one reason for each row that was left out
    notes: tuple[str, ...] = ()  # messages to the user


@dataclass(frozen=True)
class ProblemSet:
    """The training problems and their order.

    Every epoch orders all n problems in a new way and cuts them into floor(n / problems_per_step) steps. The epoch does
    not use the rest. Raises UserError if one step needs more problems than there are.
    """

    problems: tuple[Problem, ...]
    problems_per_step: int
    seed: int
    bad_rows: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    steps_per_epoch: int = field(init=False)

    def __post_init__(self) -> None:
        if self.problems_per_step > len(self.problems):
            raise UserError(
                f"data.problems_per_step is {self.problems_per_step}, but data.train has {len(self.problems)} usable"
                f" problems; set it to at most {len(self.problems)}, or add problems"
            )
        object.__setattr__(self, "steps_per_epoch", len(self.problems) // self.problems_per_step)

    def __len__(self) -> int:
        return len(self.problems)

    def epoch(self, step: int) -> int:
        """Returns the epoch of a step. Both count from 1."""
        return (step - 1) // self.steps_per_epoch + 1

    def batch(self, step: int) -> tuple[Problem, ...]:
        """Returns the problems of a step, over all ranks. Steps count from 1 over the complete run."""
        if step < 1:
            raise ValueError(f"steps count from 1, not from {step}")
        order = _order(self.seed, self.epoch(step), len(self.problems))
        first = (step - 1) % self.steps_per_epoch * self.problems_per_step
        return tuple(self.problems[index] for index in order[first : first + self.problems_per_step])


def load_problems(
    settings: "DataSettings", *, grade: Grader | None = None, prompt_limit: PromptLimit | None = None
) -> ProblemSet:
    """Reads the training problems and checks every row.

    grade: decides whether `answer` equals the solution's last box if their texts differ. With None or with
    `check_answers: false` this is not checked. Raises UserError for a source that cannot be read or has no needed
    column. With `on_bad_row: error` it also raises UserError for a bad row and names its file and line.
    """
    loaded = _load(
        settings.train,
        settings,
        setting="data",
        needs_solution=True,
        skip=settings.on_bad_row == "skip",
        checks=_Checks(grade if settings.check_answers else None, prompt_limit),
    )
    return ProblemSet(
        loaded.problems, settings.problems_per_step, settings.seed, bad_rows=loaded.bad_rows, notes=loaded.notes
    )


def load_held_out(settings: "EvaluationSettings", *, prompt_limit: PromptLimit | None = None) -> LoadedProblems:
    """Reads the first `limit` problems to evaluate on, in the order of the source. Solutions may be missing.

    Raises UserError for a bad row and for a source that cannot be read.
    """
    if settings.problems is None:
        raise UserError("evaluation.problems is null; name a file of held-out problems")
    return _load(
        settings.problems,
        settings,
        setting="evaluation",
        needs_solution=False,
        skip=False,
        checks=_Checks(None, prompt_limit),
        limit=settings.limit,
    )


class _BadRow(ValueError):
    """A row cannot be used. The text is the reason."""


@dataclass(frozen=True)
class _Checks:
    """Checks of a complete problem, after the checks of its columns."""

    grade: Grader | None
    prompt_limit: PromptLimit | None

    def __call__(self, problem: Problem) -> str | None:
        """Returns a note or None. Raises _BadRow for a problem that cannot be used."""
        limit = self.prompt_limit
        if limit is not None and _may_be_longer(problem, limit.most):
            length = limit.length(problem)
            if length > limit.most:
                raise _BadRow(f"its longest prompt has {length} tokens; at most {limit.most} fit ({limit.reason})")
        return None if self.grade is None else _check_answer(problem, self.grade)


def _load(
    source: str,
    settings: "DataSettings | EvaluationSettings",
    *,
    setting: str,
    needs_solution: bool,
    skip: bool,
    checks: _Checks,
    limit: int | None = None,
) -> LoadedProblems:
    file_setting = "data.train" if setting == "data" else "evaluation.problems"
    rows = read_rows(source, format=settings.format, split=settings.split, setting=file_setting)[:limit]
    columns = settings.columns
    notes = []
    has_ids = _check_columns(rows, columns, setting=setting, source=source, needs_solution=needs_solution)
    if not has_ids:
        notes.append(f"{source}: no row has a column {columns.id!r}; file name and line are used as id")
    problems: dict[str, Problem] = {}
    bad_rows = []
    for row in rows:
        try:
            problem = _problem(row, columns, has_ids=has_ids, needs_solution=needs_solution)
            if problem.id in problems:
                raise _BadRow(f"id {problem.id!r} is already used at {problems[problem.id].source}")
            note = checks(problem)
        except _BadRow as reason:
            bad_rows.append(f"{row.where}: {reason}")
        else:
            problems[problem.id] = problem
            if note:
                notes.append(f"{row.where}: {note}")
    if bad_rows and not skip:
        raise UserError(_bad_rows_message(bad_rows, len(rows), setting))
    if bad_rows:
        notes.append(_skipped_note(bad_rows, len(rows), source))
    if not problems:
        raise UserError(f"{file_setting}: {source} has no usable problem")
    return LoadedProblems(problems=tuple(problems.values()), bad_rows=tuple(bad_rows), notes=tuple(notes))


def _check_columns(
    rows: Sequence[Row], columns: "ColumnSettings", *, setting: str, source: str, needs_solution: bool
) -> bool:
    """Tells whether the rows have ids. Raises UserError if no row has a needed column."""
    present = {name for row in rows if row.values is not None for name in row.values}
    if not present:
        return True  # no row could be read; the reasons of the rows say more
    needed = {"problem": columns.problem, "answer": columns.answer}
    if needs_solution:
        needed["solution"] = columns.solution
    if columns.id != DEFAULT_ID_COLUMN:
        needed["id"] = columns.id
    for role, name in needed.items():
        if name not in present:
            raise UserError(
                f"{setting}.columns.{role}: no row of {source} has a column {name!r}. The columns are"
                f" {', '.join(sorted(present))}.{nearest(name, present)}"
            )
    return columns.id in present


def _problem(row: Row, columns: "ColumnSettings", *, has_ids: bool, needs_solution: bool) -> Problem:
    if row.values is None:
        raise _BadRow(row.broken)
    values = row.values
    solution = values.get(columns.solution)
    return Problem(
        id=_label(values, columns.id) if has_ids else row.name,
        problem=_text(values, columns.problem),
        solution=_text(values, columns.solution) if needs_solution or solution not in (None, "") else "",
        answer=_answer(values, columns.answer),
        source=row.where,
    )


def _text(values: dict[str, Any], column: str) -> str:
    value = values.get(column)
    if value is None:
        raise _BadRow(f"column {column!r} is missing")
    if not isinstance(value, str):
        raise _BadRow(f"column {column!r} holds {_kind(value)}, not text")
    if not value.strip():
        raise _BadRow(f"column {column!r} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _BadRow(f"column {column!r} is broken Unicode: a lone surrogate at character {error.start}") from error
    return value


def _label(values: dict[str, Any], column: str) -> str:
    value = values.get(column)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return _text(values, column)


def _answer(values: dict[str, Any], column: str) -> str:
    """Returns the answer as text. A number is accepted if there is only one way to write it."""
    value = values.get(column)
    if isinstance(value, float):
        if value.is_integer() and abs(value) < LARGEST_EXACT_FLOAT:
            return str(int(value))
        text = repr(value)
        if not text.lstrip("-").replace(".", "").isdigit():
            raise _BadRow(f"column {column!r} holds the number {text}; write the answer as text")
        return text
    return _label(values, column)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), type(value).__name__)


def _check_answer(problem: Problem, grade: Grader) -> str | None:
    """Raises _BadRow if the answer differs from the solution's last box. Returns a note if the grader timed out."""
    box = last_box(problem.solution)
    if box is None or same_text(box, problem.answer):
        return None
    verdict = grade(problem.solution, answer=problem.answer)
    if verdict.outcome == "timeout":
        return f"the grader ran out of time comparing answer {problem.answer!r} with box {box!r}; the row is kept"
    if verdict.outcome == "no_answer":  # the box is in a thought that never ends
        return None
    if not verdict.correct:
        raise _BadRow(f"answer {problem.answer!r} differs from the solution's last box {box!r}")
    return None


def _may_be_longer(problem: Problem, most: int) -> bool:
    """Tells whether a prompt may exceed `most` tokens: a token has at least one byte, a template may repeat a text."""
    template_allowance = 2048
    longest = 2 * (len(problem.problem.encode()) + len(problem.solution.encode())) + template_allowance
    return longest > most


def _bad_rows_message(bad_rows: Sequence[str], count: int, setting: str) -> str:
    more = len(bad_rows) - 1
    others = f" ({more} more bad {'row' if more == 1 else 'rows'} of {count})" if more else ""
    advice = "correct the row, or set data.on_bad_row: skip" if setting == "data" else "correct the row"
    return f"{bad_rows[0]}{others}; {advice}"


def _skipped_note(bad_rows: Sequence[str], count: int, source: str) -> str:
    first = "; ".join(bad_rows[:REASONS_SHOWN])
    more = "; ..." if len(bad_rows) > REASONS_SHOWN else ""
    return f"{source}: {len(bad_rows)} of {count} rows left out: {first}{more}"


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return permutation(derive_key("order of problems", seed, epoch), count)
