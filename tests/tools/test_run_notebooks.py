"""The notebooks of docs/notebooks/ run, and their stored outputs are small."""

import importlib
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="the notebooks need the extra docs: pip install -e '.[docs]'")
pytest.importorskip("ipykernel", reason="the notebooks need the extra docs: pip install -e '.[docs]'")

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))
run_notebooks = importlib.import_module("run_notebooks")

NOTEBOOKS = sorted(run_notebooks.FOLDER.glob("*.ipynb"))
LARGEST = 60_000  # bytes of a stored notebook


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.long  # `make docs` runs them too
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path):
    """Each cell asserts what its text claims. Every cell that prints when it runs also has a stored output."""
    notebook = run_notebooks.execute(path)
    stored = nbformat.read(path, as_version=4)
    assert [len(cell.outputs) > 0 for cell in code_cells(notebook)] == [
        len(cell.outputs) > 0 for cell in code_cells(stored)
    ]
    assert path.stat().st_size < LARGEST


def test_the_notebooks_are_those_of_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text()
    assert len(NOTEBOOKS) == 2
    assert not [path.stem for path in NOTEBOOKS if f"notebooks/{path.stem}.md" not in text]


def test_stored_outputs_name_no_machine():
    for path in NOTEBOOKS:
        text = path.read_text()
        assert str(ROOT) not in text
        assert not [word for word in ("/home/", "/root/", "/tmp/") if word in text]


def test_an_error_in_a_cell_ends_the_tool(tmp_path, capsys):
    path = tmp_path / "wrong.ipynb"
    cells = [nbformat.v4.new_code_cell("value = 6 * 7\nprint(value)"), nbformat.v4.new_code_cell("assert value == 41")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    before = path.read_bytes()
    assert run_notebooks.main([str(path), "--write"]) == 1
    assert path.read_bytes() == before
    assert "assert value == 41" in capsys.readouterr().err


def test_outputs_are_stored_without_stderr(tmp_path, capsys):
    path = tmp_path / "right.ipynb"
    source = "import sys\nprint('kept')\nprint('not kept', file=sys.stderr)\n42"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)]), path)
    assert run_notebooks.main([str(path), "--write"]) == 0
    assert capsys.readouterr().out == "right.ipynb: 1 cells executed\n"
    (cell,) = nbformat.read(path, as_version=4).cells
    assert [output.get("text", output.get("data", {}).get("text/plain")) for output in cell.outputs] == ["kept\n", "42"]
