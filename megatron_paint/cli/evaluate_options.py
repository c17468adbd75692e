"""What `megatron-paint evaluate` was asked for: settings, benchmarks and where the results go."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_paint.base.errors import UserError
from megatron_paint.checkpoints.run_state import RUN_STATE
from megatron_paint.config.load import override_tree, read_tree, settings_of
from megatron_paint.config.settings import Settings
from megatron_paint.evaluation.benchmarks import names_in

DEFAULT_OUT = "evaluations"


@dataclass(frozen=True, kw_only=True)
class Requested:
    """One evaluation of one model."""

    settings: Settings
    model: str  # as reports name it
    benchmarks: tuple[str, ...]  # names or files
    out: Path


def requested(
    *,
    config: Path | None,
    model: Path | None,
    benchmarks: str | None,
    samples: int | None,
    out: Path | None,
    overrides: list[str],
) -> Requested:
    """What the options ask for; UserError that says which of them is missing.

    config: a settings file, whose model and held-out problems are the defaults; model: a Hugging Face folder, or a
    checkpoint of a run, which knows the Hugging Face folder that it came from.
    """
    if config is None and model is None:
        raise UserError("evaluate needs a model: give --model FOLDER, or a settings file")
    tree = read_tree(config) if config is not None else _bare_tree()
    if model is not None:
        _take_model(tree, model)
    if samples is not None:
        overrides = [*overrides, f"evaluation.samples={samples}"]
    settings = settings_of(override_tree(tree, overrides))
    held_out = settings.evaluation.problems
    names = names_in(benchmarks or "")
    if not names and held_out is None:
        raise UserError("evaluation.problems is not set: give --benchmarks aime24,FILE,..., or the file of problems")
    name = str(model or settings.model.megatron_path or settings.model.hf_path)
    return Requested(
        settings=settings,
        model=name,
        benchmarks=names or (held_out,),
        out=out or Path(DEFAULT_OUT) / Path(name).resolve().name,
    )


def _bare_tree() -> dict[str, Any]:
    """Settings of an evaluation alone: nothing is trained, and no run folder is made."""
    return {"data": {"train": "none"}, "run": {"dir": "none"}, "rollout": {"max_new_tokens": 1}}


def _take_model(tree: dict[str, Any], folder: Path) -> None:
    if (folder / "config.json").is_file():
        tree["model"] = {**(tree.get("model") or {}), "hf_path": str(folder)}
        for key in ("megatron_path", "lora"):
            tree["model"].pop(key, None)
        return
    if not (folder / ".metadata").is_file():
        raise UserError(
            f"--model: {folder} is neither a Hugging Face folder (it has no config.json) nor a Megatron checkpoint (it "
            "has no .metadata); of a run, give RUN/hf/step_... or RUN/checkpoints/step_..."
        )
    if (folder / RUN_STATE).is_file():
        try:
            settings = json.loads((folder / RUN_STATE).read_text(encoding="utf-8"))["settings"]
            model, prompts = dict(settings["model"]), dict(settings["prompts"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"--model: {folder / RUN_STATE} is not readable ({error!r}); copy it again") from error
        tree["model"], tree["prompts"] = model, prompts
    tree["model"] = {**(tree.get("model") or {}), "megatron_path": str(folder)}
