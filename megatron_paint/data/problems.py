"""Problems with verified solutions, and their shuffled order: the batch of a step is a function of (seed, step).

Every row is checked when it is read. An error names a bad row by file and line. A fault that all rows share is a fault
of a setting or of the file, and the error says so.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from megatron_paint.base.counts import count_text
from megatron_paint.base.errors import UserError
from megatron_paint.base.keys import derive_key, permutation
from megatron_paint.config.domains import BOXED_GRADERS, DomainSettings, domain_of, known_domains
from megatron_paint.data.answer_check import Grader, check_answer, verdicts_on
from megatron_paint.data.cells import (
    RESULT_MARK,
    USED_ID,
    BadRow,
    Cell,
    Form,
    answer_for_function,
    answer_of,
    choices_of,
    domain_of_row,
    id_of,
    optional_text_of,
    problem_of,
    text_of,
)
from megatron_paint.data.columns import Columns, needed_by_view
from megatron_paint.data.prompt_limit import PromptLimit
from megatron_paint.data.repeats import repeats
from megatron_paint.data.row_messages import (
    REASONS_SHOWN,
    bad_rows_message,
    check_shared_faults,
    form_notes,
    skipped_note,
)
from megatron_paint.data.rows import Row
from megatron_paint.data.sources import read_rows
from megatron_paint.data.statistics import oddities
from megatron_paint.grading.final_answers import letter_of
from megatron_paint.grading.grade import Grade
from megatron_paint.records import Problem
from megatron_paint.runtime.work import work

if TYPE_CHECKING:
    from megatron_paint.config.settings import DataSettings, EvaluationSettings


@dataclass(frozen=True, kw_only=True)
class LoadedProblems:
    """The good rows of a source, in the order of the source."""

    problems: tuple[Problem, ...]
    bad_rows: tuple[str, ...] = ()  # one reason for each row that was left out
    notes: tuple[str, ...] = ()  # messages to the user
    warnings: tuple[str, ...] = ()  # messages that are printed in quiet mode too


@dataclass(frozen=True)
class ProblemSet:
    """The training problems and their shuffled order; `order.py` has the other orders.

    Every epoch orders all n problems in a new way and cuts them into floor(n / problems_per_step) steps. The epoch does
    not use the rest. Raises UserError if one step needs more problems than there are.
    """

    problems: tuple[Problem, ...]
    problems_per_step: int
    seed: int
    bad_rows: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    steps_per_epoch: int = field(init=False)

    def __post_init__(self) -> None:
        if self.problems_per_step > len(self.problems):
            raise UserError(
                f"data.problems_per_step is {self.problems_per_step}, but data.train has "
                f"{count_text(len(self.problems), 'usable problem')}; set it to at most {len(self.problems)}, or add "
                "problems"
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
    settings: "DataSettings",
    *,
    solution_needed_by: str | None = "training",
    view: str = "full",
    grade: Grader | None = None,
    prompt_limit: PromptLimit | None = None,
    mistake: Callable[[Problem], str | None] | None = None,
    domains: Mapping[str, DomainSettings] | None = None,
) -> ProblemSet:
    """Reads the training problems and checks every row.

    solution_needed_by: what needs a solution in each row, for errors; None: a row may be without a solution.
    view: `objective.reveal.view`, the text of each problem that is its reference.
    grade: gets all pairs (solution, answer) in which the solution's last box is another text than `answer`, and decides
    whether they are equal. With None or with `check_answers: false` this is not checked, and it never is for problems
    with another grader than math. mistake: returns why a problem cannot be used, or None. domains: the section of this
    name. Raises UserError for a source that cannot be read or has no needed column, and for a response that leaves no
    room for the prompts. With `on_bad_row: error` it also raises UserError for a bad row and names its file and line.
    """
    loaded = _load(
        settings.train,
        settings,
        setting="data.train",
        solution_needed_by=solution_needed_by,
        skip=settings.on_bad_row == "skip",
        checks=_Checks(grade if settings.check_answers else None, prompt_limit, mistake, domains=domains or {}),
        view=view,
    )
    boxed = [one for one in loaded.problems if domain_of(domains or {}, one.domain).grader in BOXED_GRADERS]
    odd = oddities(boxed, setting="data", solutions=solution_needed_by is not None)
    return ProblemSet(
        loaded.problems,
        settings.problems_per_step,
        settings.seed,
        bad_rows=loaded.bad_rows,
        notes=loaded.notes,
        warnings=(*loaded.warnings, *odd),
    )


def load_held_out(
    settings: "EvaluationSettings", *, needs_mark: bool = False, domains: Mapping[str, DomainSettings] | None = None
) -> LoadedProblems:
    """Reads the first `limit` problems to evaluate on, in the order of the source. Solutions may be missing.

    needs_mark: each answer must be a worked solution that ends in "#### RESULT". domains: the section of this name.
    Raises UserError for a bad row and for a source that cannot be read.
    """
    if settings.problems is None:
        raise UserError("evaluation.problems is null; name a file of held-out problems")
    return _load(
        settings.problems,
        settings,
        setting="evaluation.problems",
        solution_needed_by=None,
        skip=False,
        checks=_Checks(needs_mark=needs_mark, domains=domains or {}),
        limit=settings.limit,
    )


class _TooLong(BadRow):
    """The prompt of a row would fit before a shorter response."""

    def __init__(self, length: int, limit: PromptLimit):
        super().__init__(
            f"its longest prompt has {length} tokens{limit.shown_text}; at most {limit.most} fit beside "
            f"{limit.setting}={limit.response}"
        )
        self.length = length


@dataclass(frozen=True)
class _Checks:
    """Checks of a complete problem, after the checks of its columns."""

    grade: Grader | None = None
    prompt_limit: PromptLimit | None = None
    mistake: Callable[[Problem], str | None] | None = None
    needs_mark: bool = False
    domains: Mapping[str, DomainSettings] = field(default_factory=dict)

    def __call__(self, problem: Problem, form: Form) -> None:
        """Raises BadRow for a problem that cannot be used, except for its answer."""
        if self.needs_mark and form != "marked":
            raise BadRow(f"the answer has no {RESULT_MARK!r}; this benchmark has the answer after this mark")
        if self._grader(problem) == "choice" and letter_of(problem.answer, problem.choices) is None:
            raise BadRow(_no_choice(problem), role="answer", fault="names no choice")
        if self.mistake is not None and (reason := self.mistake(problem)) is not None:
            raise BadRow(reason)
        limit = self.prompt_limit
        if limit is not None and _may_be_longer(problem, limit.most):
            length = limit.length(problem)
            if length > limit.most and limit.setting and limit.longest_response(length) > 0:
                raise _TooLong(length, limit)
            if length > limit.most:
                what = "longest prompt has" if limit.setting else "prompt and solution have"
                raise BadRow(f"its {what} {length} tokens, and {limit.positions_text}")

    def verdicts(self, problems: Iterable[Problem]) -> dict[str, Grade]:
        """Returns the grader's verdicts on the answers whose grader compares boxes, by file and line."""
        boxed = [problem for problem in problems if self._grader(problem) in BOXED_GRADERS]
        return {} if self.grade is None else verdicts_on(boxed, self.grade)

    def _grader(self, problem: Problem) -> str:
        return domain_of(self.domains, problem.domain).grader


class _Found:
    """The rows of a source, divided into problems, bad rows and rows whose prompt is too long."""

    def __init__(self, checks: _Checks, verdicts: Mapping[str, Grade]):
        self.checks, self.verdicts = checks, verdicts
        self.problems: dict[str, Problem] = {}
        self.bad: list[tuple[Row, BadRow]] = []
        self.too_long: dict[str, _TooLong] = {}  # by file and line
        self.forms: Counter[str] = Counter()
        self.systems: dict[str, str] = {}  # text of a system message -> place of the first
        self.notes: list[str] = []

    def add(self, row: Row, read: tuple[Problem, Form, str] | BadRow) -> None:
        """Adds what was read from a row, checked."""
        try:
            if isinstance(read, BadRow):
                raise read
            problem, form, system = read
            if problem.id in self.problems:
                raise BadRow(f"id {problem.id!r} is already used at {self.problems[problem.id].source}", fault=USED_ID)
            self.checks(problem, form)
            note = check_answer(problem, self.verdicts)
        except _TooLong as reason:
            self.too_long[row.where] = reason
        except BadRow as reason:
            self.bad.append((row, reason))
        else:
            self.problems[problem.id] = problem
            self.forms[form] += 1
            if system:
                self.systems.setdefault(system, row.where)
            if note:
                self.notes.append(f"{row.where}: {note}")

    def too_long_message(self, source: str, *, count: int) -> str:
        """What to change for the longest of the prompts that are too long. count: rows of the source."""
        where = max(self.too_long, key=lambda where: self.too_long[where].length)
        message = self.checks.prompt_limit.message(self.too_long[where].length, source=source, where=where)
        if self.problems:
            rows = f"the {len(self.too_long):,} of {count_text(count, 'row')} with such prompts"
            message += f", or leave out {rows} by data.on_bad_row=skip"
        return message


def _load(
    source: str,
    settings: "DataSettings | EvaluationSettings",
    *,
    setting: str,
    solution_needed_by: str | None,
    skip: bool,
    checks: _Checks,
    limit: int | None = None,
    view: str = "full",
) -> LoadedProblems:
    columns = Columns(
        settings.columns,
        setting=setting,
        source=source,
        solution_needed_by=solution_needed_by,
        view=view if view in settings.columns.views else None,
    )
    needed = [name for name in columns.names.values() if name is not None]
    all_rows = read_rows(source, format=settings.format, split=settings.split, setting=setting, needed=needed)
    rows = [columns.take(row) for row in islice(all_rows, limit)]
    columns.check()
    notes = []
    has_ids = "id" in columns.found
    if not has_ids and columns.names["id"] is not None:
        notes.append(f"{source}: no row has a column {columns.names['id']!r}; file name and line are used as id")
    reader = _RowReader(
        columns=columns,
        domains=checks.domains,
        domain=settings.domain,
        has_ids=has_ids,
        shows_answer=view == "answer",
    )
    read = [reader(row) for row in rows]
    found = _Found(checks, checks.verdicts(one[0] for one in read if not isinstance(one, BadRow)))
    with work("checking problems", total=len(rows), unit="rows") as checked:
        for row, one in zip(rows, read, strict=True):
            found.add(row, one)
            checked.advance()
    check_shared_faults(found.bad, columns, count=len(rows))
    bad_rows = tuple(f"{row.where}: {reason}" for row, reason in found.bad)
    if bad_rows and not skip:
        raise UserError(bad_rows_message(bad_rows, len(rows), columns.section))
    if found.too_long and not (skip and found.problems):
        raise UserError(found.too_long_message(source, count=len(rows)))
    bad_rows += tuple(f"{where}: {reason}" for where, reason in found.too_long.items())
    notes += found.notes
    if bad_rows:
        notes.append(skipped_note(bad_rows, len(rows), source))
    if not found.problems:
        raise UserError(f"{setting}: {source} has no usable problem: {'; '.join(bad_rows[:REASONS_SHOWN])}")
    good = tuple(found.problems.values())
    notes += form_notes(found.forms, found.systems, columns, count=len(good))
    return LoadedProblems(problems=good, bad_rows=bad_rows, notes=tuple(notes), warnings=repeats(good, setting=setting))


@dataclass(frozen=True, kw_only=True)
class _RowReader:
    """Makes the problems of rows."""

    columns: Columns
    domains: Mapping[str, DomainSettings]
    domain: str  # of a row that names none
    has_ids: bool
    shows_answer: bool  # the view is the answer

    def __call__(self, row: Row) -> tuple[Problem, Form, str] | BadRow:
        """Returns the problem, the form of its answer and the text of its system message, or why there is none."""
        try:
            return self._problem(row)
        except BadRow as reason:
            return reason.with_traceback(None)

    def _problem(self, row: Row) -> tuple[Problem, Form, str]:
        if row.values is None:
            raise BadRow(row.broken)
        columns = self.columns
        cells = {role: Cell(role, name, row.values.get(role)) for role, name in columns.names.items()}
        problem_id = id_of(cells["id"]) if self.has_ids else row.name
        problem, system = problem_of(cells["problem"])
        solution = optional_text_of(cells["solution"])
        if columns.solution_needed_by and not solution:
            solution = _needed_text(cells["solution"], columns.solution_needed_by)
        view = "" if columns.view is None else _needed_text(cells[columns.view], needed_by_view(columns.view))
        domain = domain_of_row(cells["domain"], default=self.domain, known=known_domains(self.domains))
        if domain_of(self.domains, domain).function is None:
            answer, form = answer_of(cells["answer"])
        else:  # what the function takes as the answer is its own affair: a test program may contain "####"
            answer, form = answer_for_function(cells["answer"]), "text"
        if self.shows_answer:
            view = f"\\boxed{{{answer}}}"
        read = Problem(
            id=problem_id,
            problem=problem,
            solution=solution,
            answer=answer,
            source=row.where,
            view=view,
            domain=domain,
            choices=choices_of(cells["choices"]),
        )
        return read, form, system


def _no_choice(problem: Problem) -> str:
    if problem.choices:
        last = chr(ord("A") + len(problem.choices) - 1)
        return f"answer {problem.answer!r} is neither a letter from A to {last} nor the text of one of the choices"
    return f"answer {problem.answer!r} is not the letter of a choice; for its text, name data.columns.choices"


def _needed_text(cell: Cell, needed_by: str) -> str:
    """Returns the text. Raises BadRow, with what needs it."""
    try:
        return text_of(cell)
    except BadRow as reason:
        raise BadRow(f"{reason}; {needed_by} needs it", role=reason.role, fault=reason.fault) from None


def _may_be_longer(problem: Problem, most: int) -> bool:
    """Tells whether a prompt may exceed `most` tokens: a token has at least one byte, a template may repeat a text."""
    template_allowance = 2048
    longest = 2 * (len(problem.problem.encode()) + len(problem.reference.encode())) + template_allowance
    return longest > most


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return permutation(derive_key("order of problems", seed, epoch), count)
