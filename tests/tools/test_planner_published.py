"""The comparison with published speeds in docs/planner.md is the one of the model."""

import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))
planner_published = importlib.import_module("planner_published")
PAGE = (ROOT / "docs" / "planner.md").read_text()


def test_the_page_has_the_table_of_the_model():
    assert "\n".join(planner_published.table()) in PAGE


def test_fitted_rows_are_met():
    """What the factors were fitted to must come out, within 15 %."""
    fitted = {row.what: row.predicted() / row.published for row in planner_published.ROWS if "fitted" in row.note}
    assert len(fitted) == 3
    assert fitted == {name: pytest.approx(1, abs=0.15) for name in fitted}
