"""docs/settings.md and docs/metrics.md are what tools/make_docs.py writes from the code."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_paint.config import describe
from megatron_paint.objectives.metric_table import METRICS

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))
make_docs = importlib.import_module("make_docs")


@pytest.mark.parametrize("path", make_docs.PAGES, ids=lambda path: path.name)
def test_the_page_is_current(path):
    assert path.read_text(encoding="utf-8") == make_docs.PAGES[path](), "run python tools/make_docs.py"


def test_the_pages_hold_every_key():
    settings, metrics = make_docs.settings_page(), make_docs.metrics_page()
    for section in describe.sections():
        part = settings.split(f"## `{section.key}`\n")[1].split("\n## ")[0]
        for setting in section.settings:
            name = setting.key.rpartition(".")[2]
            assert f"| `{name}` | {setting.type}" in part, setting.key
            assert setting.meaning.replace("|", "\\|") in part, setting.key
    assert all(f"| `{key}` | {metric.meaning}" in metrics for key, metric in METRICS.items())


def test_the_tool_documents_its_own_tree(tmp_path):
    """Another version is installed, and the tool is called without PYTHONPATH for this tree."""
    other = tmp_path / "megatron_paint"
    other.mkdir()
    (other / "__init__.py").write_text("raise AssertionError('the other version was imported')")
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'tools')!r}); import make_docs; print(make_docs.describe.__file__)"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert ran.returncode == 0, ran.stderr
    assert Path(ran.stdout.strip()) == ROOT / "megatron_paint" / "config" / "describe.py"


def test_the_tool_finds_and_mends_a_page_that_is_not_current(tmp_path, monkeypatch, capsys):
    page = tmp_path / "settings.md"
    page.write_text("old")
    monkeypatch.setattr(make_docs, "PAGES", {page: make_docs.settings_page})
    assert make_docs.main(["--check"]) == 1
    assert page.read_text() == "old"
    assert make_docs.main([]) == 0
    assert page.read_text() == make_docs.settings_page()
    assert make_docs.main(["--check"]) == 0
    assert [line.split(" ", 1)[1] for line in capsys.readouterr().out.splitlines()] == [
        "is not current: run python tools/make_docs.py",
        "written",
    ]
