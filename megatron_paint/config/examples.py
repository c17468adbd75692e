"""The folder of the presets and the quickstart: `examples/` of a checkout, or the copy that an installed wheel has."""

from pathlib import Path

from megatron_paint.base.argument_parser import did_you_mean
from megatron_paint.base.errors import UserError

PACKAGE = Path(__file__).parents[1]
FAMILY, SHARED = "qwen3_", "qwen3_base"  # the shared folder is the base of every size
FIRST = "paint"  # is listed before the baselines


def examples_folder() -> Path:
    """The folder with the presets of each size and the quickstart. UserError: this installation has none."""
    for folder in (PACKAGE / "examples", PACKAGE.parent / "examples"):
        if (folder / SHARED / "paint.yaml").is_file():
            return folder
    raise UserError(
        f"this installation of megatron-paint in {PACKAGE} has no presets and no quickstart: install it again, from a "
        "wheel or from a checkout"
    )


def sizes() -> list[str]:
    """The names of the model sizes that have presets, such as qwen3_8b, from the smallest to the largest."""
    found = [path.parent.name for path in examples_folder().glob(f"{FAMILY}*/paint.yaml")]
    return sorted((name for name in found if name != SHARED), key=_parameters)


def objectives(size: str) -> list[str]:
    """The names of the presets of a size: paint, then its baselines. UserError: there is no such size."""
    known = sizes()
    if size not in known:
        plain = size.lower().replace("-", "_").replace(".", "p")
        raise UserError(f"unknown model size {size!r}: {_near(plain, known)}")
    names = sorted(path.stem for path in (examples_folder() / size).glob("*.yaml"))
    return sorted(names, key=lambda name: name != FIRST)


def preset_file(size: str, objective: str) -> Path:
    """The settings file of a size and an objective. UserError names the nearest ones."""
    known = objectives(size)
    if objective not in known:
        raise UserError(f"unknown objective {objective!r} for {size}: {_near(objective.lower(), known)}")
    return examples_folder() / size / f"{objective}.yaml"


def _near(word: str, known: list[str]) -> str:
    near = did_you_mean(word, known)
    return f"{near} Known: {', '.join(known)}" if near else f"choose from {', '.join(known)}"


def _parameters(size: str) -> float:
    """The billions of parameters in a name: 1.7 for qwen3_1p7b, 30 for qwen3_30b_a3b."""
    return float(size.removeprefix(FAMILY).partition("b")[0].replace("p", "."))
