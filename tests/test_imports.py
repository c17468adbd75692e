"""Who may import what: one ordered list of floors, Megatron behind one door, no torch where text is worked on."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "megatron_paint"
# A part imports only itself and the parts before it.
ORDER = (
    "base",
    "records",
    "config",
    "runtime",
    "grading",
    "masker",
    "data",
    "losses",
    "models",
    "checkpoints",
    "planning",
    "policy",
    "convert",
    "rollouts",
    "evaluation",
    "objectives",
    "mcore",
    "run",
    "report",
    "launch",
    "training",
    "search",
    "cli",
    "__main__",
)
WITHOUT_TORCH = ("base", "records", "config", "grading", "masker", "data")


def imported(path: Path) -> set[str]:
    """Modules that a file imports, inside functions and for type checkers too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def part_of(path: Path) -> str:
    """The package or module at the top level that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def test_the_list_is_complete():
    assert {part_of(path) for path in FILES} == set(ORDER)


@pytest.mark.parametrize("part", ORDER)
def test_order(part):
    allowed = ORDER[: ORDER.index(part) + 1]
    for path in (path for path in FILES if part_of(path) == part):
        modules = {name for name in imported(path) if name.startswith("megatron_paint.")}
        above = {name for name in modules if name.split(".")[1] in ORDER and name.split(".")[1] not in allowed}
        assert not above, f"{path} imports {sorted(above)}"


def test_only_mcore_imports_megatron():
    for path in FILES:
        roots = {name.split(".")[0] for name in imported(path)}
        assert part_of(path) == "mcore" or not roots & {"megatron", "transformer_engine"}, path


def test_text_is_worked_on_without_torch():
    for path in FILES:
        if part_of(path) in WITHOUT_TORCH:
            assert "torch" not in {name.split(".")[0] for name in imported(path)}, path


def test_objectives_use_no_machine_and_no_run():
    """The order forbids mcore, run and training; this also keeps rank environments out of the algorithms."""
    for path in (path for path in FILES if part_of(path) == "objectives"):
        assert not imported(path) & {"torch.distributed", "megatron_paint.runtime.heartbeat"}, path


def test_importing_needs_no_gpu_library():
    """The command line and the settings come up with none of them importable."""
    code = (
        "import sys\n"
        "for name in ('transformer_engine', 'triton', 'apex', 'vllm', 'amp_C'): sys.modules[name] = None\n"
        "import megatron_paint.cli.main, megatron_paint.config.load\n"
        "import megatron_paint.training.start, megatron_paint.mcore.ranks\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent, timeout=600)
