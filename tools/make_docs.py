"""Writes docs/settings.md, docs/metrics.md and docs/recipes/ from the code: `python tools/make_docs.py`.

`--check` writes nothing and ends with status 1 if a page is not current.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the pages are about this tree, also where another version is installed

from megatron_paint.config import describe  # noqa: E402
from megatron_paint.config.examples import sizes  # noqa: E402
from megatron_paint.objectives.metric_table import METRICS, Metric  # noqa: E402

SETTINGS_HEAD = """# Settings

`python tools/make_docs.py` writes this page from the settings classes in `config/`. Do not edit it by hand.
`megatron-paint settings KEY` prints the same on the console, for a key or a section.

A settings file is YAML with one block for each section. `key=value` after the file overrides it, such as
`optimizer.lr=1e-5`. A file may start with `base: OTHER.yaml`, a path relative to itself; it then holds only what
differs from that file. `null` stands for "not set". A misspelt key, a wrong type or a value outside its limits ends
the command before anything starts.

"Source" is where the default comes from. "ours" is a choice of this project. The recipe is OPSD's, because none is
published for PAINT (docs/algorithm.md). The presets in `examples/` also set values that differ from the defaults.
"""
METRICS_HEAD = """# Metrics

`python tools/make_docs.py` writes this page from `objectives/metric_table.py`. Do not edit it by hand.

metrics.jsonl in the run folder has one JSON object for each step. TensorBoard shows the same keys. A key is null or
absent where it does not apply to the objective or where the step has nothing to count. "-" means that no healthy range
is known. "Steady" means without a jump or a trend. docs/debugging.md lists symptoms and what to look at.
"""


def settings_page() -> str:
    """The text of docs/settings.md."""
    parts = [SETTINGS_HEAD]
    for section in describe.sections():
        rows = [
            (
                f"`{setting.key.removeprefix(f'{section.key}.')}`",
                f"{setting.type}: {setting.allowed}" if setting.allowed else setting.type,
                setting.default_text if setting.needed else f"`{setting.default_text}`",
                setting.meaning,
                setting.source,
            )
            for setting in section.settings
        ]
        table = _table(("key", "type and limits", "default", "meaning", "source"), rows) if rows else ""
        parts.append(f"## `{section.key}`\n\n{section.meaning}\n\n{table}".rstrip() + "\n")
    return "\n".join(parts)


def metrics_page() -> str:
    """The text of docs/metrics.md."""
    rows = [(f"`{key}`", _meaning(metric), metric.unit, metric.healthy) for key, metric in METRICS.items()]
    return f"{METRICS_HEAD}\n{_table(('key', 'meaning', 'unit', 'healthy range'), rows)}"


def _meaning(metric: Metric) -> str:
    return f"{metric.meaning} ({metric.only})" if metric.only else metric.meaning


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = tuple(head)
    lines = [head, ("---",) * len(head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def _recipe_page(size: str) -> str:
    from recipe_pages import recipe_page  # it imports torch

    return recipe_page(size, _table)


def _recipe_index() -> str:
    from recipe_pages import index_page

    return index_page(_table)


DOCS = ROOT / "docs"
PAGES: dict[Path, Callable[[], str]] = {
    DOCS / "settings.md": settings_page,
    DOCS / "metrics.md": metrics_page,
    DOCS / "recipes" / "index.md": _recipe_index,
    **{DOCS / "recipes" / f"{size}.md": partial(_recipe_page, size) for size in sizes()},
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the pages that are not current, or with --check only names them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--check", action="store_true", help="only compare the pages with the code")
    check = parser.parse_args(arguments).check
    made = {path: text() for path, text in PAGES.items()}
    old = {path: text for path, text in made.items() if not path.exists() or path.read_text(encoding="utf-8") != text}
    for path, text in old.items():
        if not check:
            path.write_text(text, encoding="utf-8")
        name = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name
        print(f"{name} {'is not current: run python tools/make_docs.py' if check else 'written'}")
    return int(check and bool(old))


if __name__ == "__main__":
    sys.exit(main())
