"""The decoder of a run's tokenizer, for commands that show samples: the model's, or that of an export in its folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_paint.base.errors import UserError
from megatron_paint.data.decoding import Decode, load_decoder
from megatron_paint.run.folder import RunFolder


def load_run_decoder(folder: RunFolder, tree: Mapping[str, Any] | None) -> tuple[Decode | None, str]:
    """The decoder, and why there is none. tree: what config.yaml has, checked or not; None: it cannot be read."""
    model, template = setting_at(tree, "model", "hf_path"), setting_at(tree, "prompts", "chat_template")
    exports = sorted((folder.path / "hf").glob("step_*"), reverse=True)
    reasons = [] if isinstance(model, str) else ["config.yaml names no model"]
    for candidate in (*([Path(model)] if isinstance(model, str) else []), *exports[:1]):
        try:
            return load_decoder(candidate, chat_template=template if isinstance(template, str) else None), ""
        except (UserError, OSError) as error:
            reasons.append(" ".join(str(error).split()))
    started = ", or run this command in the folder in which the run was started"  # where a relative path begins
    return None, reasons[0] + (started if isinstance(model, str) and not Path(model).is_absolute() else "")


def setting_at(tree: Mapping[str, Any] | None, section: str, name: str) -> Any:
    """A setting, or None where the section or the setting is missing."""
    part = (tree or {}).get(section)
    return part.get(name) if isinstance(part, Mapping) else None
