"""Messages about all rows of a source: faults that they share, forms of their answers, and rows that are left out."""

from collections import Counter
from collections.abc import Sequence

from megatron_paint.base.counts import agreeing, count_text
from megatron_paint.base.errors import UserError
from megatron_paint.data.cells import USED_ID, BadRow
from megatron_paint.data.columns import Columns
from megatron_paint.data.rows import Row

REASONS_SHOWN = 3
SYSTEM_SHOWN = 60  # characters


def check_shared_faults(bad: Sequence[tuple[Row, BadRow]], columns: Columns, *, count: int) -> None:
    """Raises UserError for a fault of a setting or of the file: one that makes all rows bad, or most ids repeat."""
    source, section = columns.source, columns.section
    repeated = [(row, reason) for row, reason in bad if reason.fault == USED_ID]
    if 2 * len(repeated) >= count > 3:
        row, reason = repeated[0]
        raise UserError(
            f"{section}.columns.id: {len(repeated)} of {count} rows of {source} have the id of an earlier row; the "
            f"first is {row.where}: {reason}. Set {section}.columns.id: null to use file name and row number as id, or "
            "name a column with another value in each row"
        )
    if len(bad) < count or count == 1:
        return
    row, reason = bad[0]
    faults = {(reason.role, reason.fault) for _, reason in bad}
    if len(faults) > 1 or not reason.fault:
        raise UserError(
            f"{columns.setting}: {source} has no usable problem: all {count} rows are bad. The first is {row.where}: "
            f"{reason}"
        )
    fix = reason.fix or columns.fix_of(reason.role)
    fault = "is null" if reason.fault == "is missing" else reason.fault
    raise UserError(
        f"{section}.columns.{reason.role}: in each of the {count} rows of {source}, column "
        f"{columns.names[reason.role]!r} {fault}.{columns.need_of(reason.role)} {fix}"
    )


def form_notes(forms: Counter[str], systems: dict[str, str], columns: Columns, *, count: int) -> list[str]:
    """Returns what was read in another form than one text. UserError if system messages differ."""
    source, notes = columns.source, []
    if forms["marked"]:
        notes.append(
            f"{source}: {forms['marked']:,} of {count_text(count, 'answer')} "
            f"{agreeing(forms['marked'], 'ends', 'end')} in '#### RESULT'; the result is the answer"
        )
    if forms["list"]:
        notes.append(
            f"{source}: {forms['list']:,} of {count_text(count, 'answer')} {agreeing(forms['list'], 'is', 'are')} a "
            "list of one text; this text is the answer"
        )
    if len(systems) > 1:
        first, second = list(systems.values())[:2]
        raise UserError(
            f"{columns.section}.columns.problem: the system messages of {source} differ (first at {first} and {second})"
            ", so they belong to the problems, and a problem is one text: write them into the user messages"
        )
    for text in systems:
        notes.append(
            f"{source}: the system message {_shortened(text)!r} is left out; the instructions are those of the "
            "templates in the section prompts"
        )
    return notes


def _shortened(text: str) -> str:
    return text if len(text) <= SYSTEM_SHOWN else text[:SYSTEM_SHOWN] + "..."


def bad_rows_message(bad_rows: Sequence[str], count: int, section: str) -> str:
    more = len(bad_rows) - 1
    others = f" ({count_text(more, 'more bad row')} of {count})" if more else ""
    advice = "correct the row, or set data.on_bad_row: skip" if section == "data" else "correct the row"
    return f"{bad_rows[0]}{others}; {advice}"


def skipped_note(bad_rows: Sequence[str], count: int, source: str) -> str:
    first = "; ".join(bad_rows[:REASONS_SHOWN])
    more = "; ..." if len(bad_rows) > REASONS_SHOWN else ""
    return f"{source}: {len(bad_rows):,} of {count_text(count, 'row')} left out: {first}{more}"
