"""Executes the notebooks of docs/notebooks/: `python tools/run_notebooks.py`. An error in a cell ends it with status 1.

`--write` also stores their outputs: what cells print and draw, without stderr. Name notebooks to execute those alone.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "notebooks"
SECONDS = 300  # limit of a cell
KEPT = ("text/plain", "image/png")


def execute(path: Path) -> nbformat.NotebookNode:
    """The notebook with its outputs, executed in an empty folder. CellExecutionError: a cell fails."""
    notebook = nbformat.read(path, as_version=4)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), before)))  # the kernel inherits it
    try:
        with tempfile.TemporaryDirectory() as folder:
            options = {"record_timing": False, "resources": {"metadata": {"path": folder}}}
            NotebookClient(notebook, kernel_name="python3", timeout=SECONDS, **options).execute()
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in map(_kept, cell.outputs) if output is not None]
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    return notebook


def _kept(output: nbformat.NotebookNode) -> nbformat.NotebookNode | None:
    """The output without what depends on the machine. None: nothing is left."""
    if output.output_type == "stream":
        return output if output.name == "stdout" else None
    data = {kind: value for kind, value in output.get("data", {}).items() if kind in KEPT}
    if "image/png" in data:
        data.pop("text/plain", None)
    return nbformat.from_dict({**output, "data": data, "metadata": {}}) if data else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Executes the notebooks; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all of docs/notebooks/")
    parser.add_argument("--write", action="store_true", help="store the outputs")
    options = parser.parse_args(arguments)
    for path in options.notebooks or sorted(FOLDER.glob("*.ipynb")):
        try:
            notebook = execute(path)
        except CellExecutionError as error:
            print(f"{path.name}: {error}", file=sys.stderr)
            return 1
        if options.write:
            nbformat.write(notebook, path)
        print(f"{path.name}: {sum(cell.cell_type == 'code' for cell in notebook.cells)} cells executed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
