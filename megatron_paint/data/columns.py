"""Finds the columns of a problem in the rows of a source, and says which ones exist if one is missing."""

from typing import TYPE_CHECKING, Any

from megatron_paint.base.errors import UserError
from megatron_paint.data.messages import is_messages
from megatron_paint.data.rows import Row, listed, nearest

if TYPE_CHECKING:
    from megatron_paint.config.settings import ColumnSettings

ROLES = ("id", "problem", "answer", "solution", "domain", "choices")
VIEW = "views."  # a view has this and its name as role, so that an error names its setting
DEFAULT_NAMES = {"id": "id", "solution": "solution"}  # of columns that a source may lack
# Names that published problem sets use.
OTHER_NAMES = {
    "problem": ("question", "prompt", "query", "input", "instruction", "problem_statement", "messages"),
    "answer": ("final_answer", "expected_answer", "ground_truth", "gold_answer", "target", "label", "solution"),
    "solution": ("rationale", "generated_solution", "response", "output", "reasoning", "cot", "answer"),
    "id": ("uid", "uuid", "unique_id", "problem_id", "problem_idx", "index", "idx"),
    "domain": ("subject", "category", "data_source", "task", "type"),
    "choices": ("options", "candidates"),
}
ROWS_LOOKED_INTO = 100
DEEPEST = 3
MISSING = object()


def field_of(values: dict[str, Any], column: str) -> Any:
    """Returns the value of a column; MISSING if the row does not have it.

    A column of exactly this name comes first. Otherwise dots lead into objects, and into lists by number from 0:
    `reward_model.ground_truth`, `prompt.0.content`.
    """
    if column in values:
        return values[column]
    if "." not in column:
        return MISSING
    found: Any = values
    for part in column.split("."):
        if isinstance(found, dict) and part in found:
            found = found[part]
        elif isinstance(found, list) and part.isdecimal() and int(part) < len(found):
            found = found[int(part)]
        else:
            return MISSING
    return found


def needed_by_view(role: str) -> str:
    """Returns the setting that needs the column of a view, for errors."""
    return f"objective.reveal.view: {role.removeprefix(VIEW)}"


class Columns:
    """Takes the columns of a problem out of each row, and remembers what the rows have.

    solution_needed_by: what needs solutions, for errors; None: nothing does. view: the view that every problem needs, a
    name of `names.views`; None: none.
    """

    def __init__(
        self,
        names: "ColumnSettings",
        *,
        setting: str,
        source: str,
        solution_needed_by: str | None,
        view: str | None = None,
    ):
        self.names = {role: getattr(names, role) for role in ROLES}
        self.names |= {VIEW + name: column for name, column in names.views.items()}
        self.view = None if view is None else VIEW + view  # its role
        self.section = setting.partition(".")[0]
        self.setting, self.source = setting, source
        self.solution_needed_by = solution_needed_by
        self.found: set[str] = set()  # roles
        self.present: set[str] = set()  # names of columns, and of fields inside objects
        self.inside: set[str] = set()  # names of columns that hold objects
        self.readable = 0  # rows
        self.first: dict[str, Any] = {}  # the first readable row

    def take(self, row: Row) -> Row:
        """Returns the row with nothing in it except the values of the problem, by their role."""
        if row.values is None:
            return row
        self.readable += 1
        if self.readable <= ROWS_LOOKED_INTO:
            self.first = self.first or row.values
            self._look_into(row.values, "")
        self.present.update(row.values)
        taken = {}
        for role, name in self.names.items():
            value = MISSING if name is None else field_of(row.values, name)
            if value is not MISSING:
                taken[role] = value
        self.found.update(taken)
        return row._replace(values=taken)

    def check(self) -> None:
        """Raises UserError if no row has a needed column, or one that a setting names."""
        if not self.readable:
            return  # the reasons of the rows say more
        values = [field_of(self.first, self.names[role]) for role in ("problem", "answer")]
        if self.readable == 1 and all(isinstance(value, dict | list) and not is_messages(value) for value in values):
            raise UserError(
                f"{self.setting}: {self.source} is one JSON object with all values of a column together; write one "
                "object a row, with pandas: `table.to_json(FILE, orient='records', lines=True)`"
            )
        needed = {role for role, name in self.names.items() if name not in (None, DEFAULT_NAMES.get(role))}
        if self.solution_needed_by:
            needed.add("solution")
        for role in (role for role in self.names if role in needed and role not in self.found):
            name = self.names[role]
            raise UserError(
                f"{self.section}.columns.{role}: no row of {self.source} has a column {name!r}. {self.known()}"
                f"{self._meant(role, name)}{self.need_of(role)}{self._wrapped()}"
            )

    def need_of(self, role: str) -> str:
        """Returns a sentence with what needs a column of this role; an empty text if every problem needs it."""
        if role == self.view:
            return f" {needed_by_view(role)} needs it."
        return f" {self.solution_needed_by} needs it." if role == "solution" and self.solution_needed_by else ""

    def known(self) -> str:
        """Returns a sentence with the columns, and with the fields of those that hold objects."""
        leaves = self.present - self.inside
        return f"The columns are {listed(leaves)}." if leaves else "It has no columns."

    def fix_of(self, role: str) -> str:
        """Returns the fix for a column whose values are objects or lists in every row."""
        name = self.names[role]
        value = field_of(self.first, name)
        if role == "id":
            return f"Set {self.section}.columns.id: null to use file name and row number as id"
        if isinstance(value, dict) and value:
            return f"Name one of its fields: {listed([f'{name}.{field}' for field in value])}"
        if is_messages(value):
            return f"Name one of its fields: {listed([f'{name}.0.{field}' for field in value[0]])}"
        if isinstance(value, list) and value:
            return f"Name one of its entries: {name}.0"
        return self.known()

    def _meant(self, role: str, name: str) -> str:
        close = nearest(name, self.present)
        if close:
            return close
        free = self.present - set(self.names.values())
        usual = OTHER_NAMES.get(role, ())
        others = [other for other in usual if other in free]
        leaves = [field for field in sorted(free) if field.rpartition(".")[2] in (name, *usual)]
        found = [*others, *leaves]
        return f" Did you mean {found[0]!r}?" if found else ""

    def _wrapped(self) -> str:
        """Returns the fix for a file that is one JSON object around its rows; otherwise an empty text."""
        lists = [name for name, value in self.first.items() if is_messages(value)]
        if self.readable != 1 or not lists:
            return ""
        return f" The file is one JSON object; write its rows alone: `jq .{lists[0]} FILE > NEW.json`"

    def _look_into(self, values: dict[str, Any], before: str) -> None:
        """Remembers the names of fields inside objects, at most three levels deep."""
        for field, value in values.items():
            name = before + field
            self.present.add(name)
            if isinstance(value, dict) and value and name.count(".") < DEEPEST:
                self.inside.add(name)
                self._look_into(value, f"{name}.")
