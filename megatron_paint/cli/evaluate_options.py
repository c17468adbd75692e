"""The request of `megatron-paint evaluate`: settings, benchmarks and the folder of the results."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_paint.base.errors import UserError
from megatron_paint.checkpoints.run_state import RUN_STATE
from megatron_paint.config.load import evaluate_settings_of, override_tree, read_tree
from megatron_paint.config.settings import EvaluateSettings
from megatron_paint.evaluation.benchmarks import names_in

DEFAULT_OUT = "evaluations"


@dataclass(frozen=True, kw_only=True)
class Requested:
    """One evaluation of one model."""

    settings: EvaluateSettings
    model: str  # its name in reports
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
    """The evaluation that the options ask for. UserError names an option that is missing.

    config: a settings file of an evaluation or of a training run. Its model and held-out problems are the defaults.
    model: a Hugging Face folder, or a checkpoint of a run, which names the Hugging Face folder that it came from.
    """
    if config is None and model is None:
        raise UserError("evaluate needs a model: give --model FOLDER, or a settings file")
    tree = read_tree(config) if config is not None else {}
    if model is not None:
        _take_model(tree, model)
    if samples is not None:
        overrides = [*overrides, f"evaluation.samples={samples}"]
    settings = evaluate_settings_of(override_tree(tree, overrides))
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


def _take_model(tree: dict[str, Any], folder: Path) -> None:
    """Puts the model of `--model` into the settings. A checkpoint of a run also sets the sections model and prompts."""
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
