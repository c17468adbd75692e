"""Rows of good problems, files of them, and the call that loads them."""

import json

from megatron_paint.config.settings import ColumnSettings, DataSettings
from megatron_paint.data.problems import load_problems


def row(number=1, **changes):
    """A good row, with changes. A change to ... removes the column."""
    good = {
        "id": f"p{number}",
        "problem": f"What is {number} + {number}?",
        "solution": f"It is \\boxed{{{2 * number}}}.",
        "answer": str(2 * number),
    }
    return {name: value for name, value in (good | changes).items() if value is not ...}


def json_lines(rows):
    """The rows as JSON lines. A row of bytes is written as it is."""
    lines = [entry if isinstance(entry, bytes) else json.dumps(entry, ensure_ascii=False).encode() for entry in rows]
    return b"\n".join(lines) + b"\n"


def write(path, rows):
    """Writes JSON lines and returns the path as text."""
    path.write_bytes(json_lines(rows))
    return str(path)


def load(source, grade=None, prompt_limit=None, solution_needed_by="training", columns=None, **options):
    """Loads training problems with these settings of the section data. `grade` decides one pair."""
    options = {"problems_per_step": 1, "columns": ColumnSettings(**(columns or {}))} | options
    return load_problems(
        DataSettings(train=str(source), **options),
        solution_needed_by=solution_needed_by,
        grade=grade and (lambda pairs: [grade(text, answer=answer) for text, answer in pairs]),
        prompt_limit=prompt_limit,
    )
