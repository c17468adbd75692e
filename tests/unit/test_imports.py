"""Who may import what: Megatron stays behind one door, the losses know no machine, importing needs no GPU library."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "megatron_paint"
EVALUATE = {"command", "recorded", "requested"}  # the evaluate command: above what it evaluates with


def imported(path: Path) -> set[str]:
    """Modules that a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def test_only_mcore_imports_megatron():
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name != "mcore":
            roots = {name.split(".")[0] for name in imported(path)}
            assert not roots & {"megatron", "transformer_engine"}, path


@pytest.mark.parametrize(
    ("part", "allowed"),
    [
        ("losses", {"losses"}),
        (
            "evaluation",
            {"evaluation", "errors", "records", "config", "keys", "policy", "prompts", "disk", "problems", "rows"}
            | {"strict_json"},
        ),
        ("rollout", {"errors", "records", "rollout"}),
        ("run", {"errors", "records", "config", "run", "evaluation", "disk", "schedule", "strict_json"}),
    ],
)
def test_directions(part, allowed):
    for path in (PACKAGE / part).rglob("*.py"):
        if part == "evaluation" and path.stem in EVALUATE:
            continue
        names = {name for name in imported(path) if name.startswith("megatron_paint.")}
        ours = {name.split(".")[1] for name in names}
        assert ours <= allowed, (path, ours - allowed)
        assert not names & {f"megatron_paint.evaluation.{name}" for name in EVALUATE}, path


def test_objectives_know_no_machine():
    for path in (PACKAGE / "objectives").rglob("*.py"):
        assert not any(name.startswith("megatron_paint.mcore") for name in imported(path)), path


def test_importing_needs_no_gpu_library():
    """The command line and the settings come up with none of them importable."""
    code = (
        "import sys\n"
        "for name in ('transformer_engine', 'triton', 'apex', 'vllm', 'amp_C'): sys.modules[name] = None\n"
        "import megatron_paint.cli.main, megatron_paint.config.load, megatron_paint.training.loop, megatron_paint.mcore.ranks\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent, timeout=600)
