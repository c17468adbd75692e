"""The folder of a search: search.yaml says which search it is, so that nobody continues it as another one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_paint.base.errors import UserError
from megatron_paint.config.saved import dotted, read_config, to_yaml
from megatron_paint.config.secrets import without_secrets
from megatron_paint.run.lock_watch import LOCK
from megatron_paint.runtime.files import clear_left_overs, disk_errors, is_left_over, write_atomically
from megatron_paint.search.journal import StudyLock

SEARCH = "search.yaml"


def open_folder(out: Path, tree: Mapping[str, Any]) -> None:
    """Makes the folder that of this search, or checks that it is. UserError: it belongs to another one."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out={out} is a file: give a folder")
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    with StudyLock(out).held():
        if (out / SEARCH).exists():
            read_folder(out, tree)
            return
        held = sorted(e.name for e in out.iterdir() if LOCK not in e.name and not is_left_over(e.name))
        if held:
            raise UserError(
                f"--out={out} is not empty and no search: it contains {', '.join(held[:3])}. Give another folder"
            )
        clear_left_overs(out)
        write_atomically(
            out / SEARCH, f"# Made by `megatron-paint search`; it compares this with a later start.\n{to_yaml(tree)}"
        )


def read_folder(out: Path, tree: Mapping[str, Any]) -> None:
    """UserError: there is no search in the folder, or one with other settings, another space or another seed."""
    if not (out / SEARCH).exists():
        raise UserError(f"--out={out} has no search: it has no {SEARCH}. Give the folder of a search")
    use = "a search keeps its settings, its space and its seed there: restore the file, or give another --out"
    before = read_config(out / SEARCH, use=use)
    if isinstance(settings := before.get("settings"), Mapping):  # earlier versions have written secrets
        before |= {"settings": without_secrets(settings)}
    old, new = dotted(before), dotted(tree)
    names = [name for name in {**old, **new} if _listed(old.get(name)) != _listed(new.get(name))]
    if names:
        changed = "; ".join(f"{name}: {old.get(name)!r} -> {new.get(name)!r}" for name in names[:5])
        raise UserError(
            f"--out={out} holds a search that began otherwise: {changed}. Its trials could not be compared with new "
            "ones: restore these, or give another --out"
        )


def _listed(value: Any) -> Any:
    """Tuples as lists, as YAML has them."""
    return [_listed(item) for item in value] if isinstance(value, list | tuple) else value
