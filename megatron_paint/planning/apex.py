"""Which package is called `apex` here: NVIDIA's, or another project that only shares the name."""

import importlib.util
import sys
from pathlib import Path

from megatron_paint.base.errors import UserError

CURE = "pip uninstall apex; NVIDIA's is built from github.com/NVIDIA/apex"


def apex_folders() -> list[str] | None:
    """Folders of the package `apex`, found without running it; None if there is no such module."""
    loaded = sys.modules.get("apex")
    if loaded is not None:
        return list(getattr(loaded, "__path__", []))
    spec = importlib.util.find_spec("apex")
    return None if spec is None else list(spec.submodule_search_locations or [])


def is_foreign(folders: list[str]) -> bool:
    """Whether it lacks the optimisers that every build of NVIDIA's has."""
    has_optimizers = any((Path(folder) / "optimizers").is_dir() for folder in folders)
    return not has_optimizers and "apex.optimizers" not in sys.modules


def refuse_foreign_apex() -> None:
    """UserError where Megatron would take another project for NVIDIA's Apex; it tells them apart by name alone."""
    folders = apex_folders()
    if folders is not None and is_foreign(folders):
        raise UserError(
            f"the module `apex` at {', '.join(folders) or 'an unknown place'} has no apex.optimizers, so it is not "
            f"NVIDIA's, but Megatron-Core takes it for that and fails in its norms: {CURE}"
        )
