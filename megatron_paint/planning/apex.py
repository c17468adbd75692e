"""Which package is named `apex` here: NVIDIA's, or another project with the same name."""

import importlib.util
import sys
from pathlib import Path

from megatron_paint.base.errors import UserError

CURE = "pip uninstall apex; NVIDIA's is built from github.com/NVIDIA/apex"


def apex_folders() -> list[str] | None:
    """Folders of the package `apex`, found without importing it; None if there is no such module."""
    loaded = sys.modules.get("apex")
    if loaded is not None:
        return list(getattr(loaded, "__path__", []))
    spec = importlib.util.find_spec("apex")
    return None if spec is None else list(spec.submodule_search_locations or [])


def is_foreign(folders: list[str]) -> bool:
    """Whether the optimisers are missing that every build of NVIDIA's package has."""
    has_optimizers = any((Path(folder) / "optimizers").is_dir() for folder in folders)
    return not has_optimizers and "apex.optimizers" not in sys.modules


def refuse_foreign_apex() -> None:
    """UserError: the package `apex` is another project. Megatron recognises NVIDIA's by the name alone."""
    folders = apex_folders()
    if folders is not None and is_foreign(folders):
        raise UserError(
            f"the module `apex` at {', '.join(folders) or 'an unknown place'} has no apex.optimizers, so it is not "
            f"NVIDIA's, but Megatron-Core would use it and fail in its norms: {CURE}"
        )
