"""The request of `megatron-paint evaluate`: settings, benchmarks and the folder of the results."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_paint.base.errors import UserError, about
from megatron_paint.checkpoints.hub import local_folder
from megatron_paint.checkpoints.megatron_folder import METADATA, megatron_folder
from megatron_paint.checkpoints.peft import ADAPTER_CONFIG, is_adapter
from megatron_paint.checkpoints.run_state import RUN_STATE
from megatron_paint.config.load import evaluate_settings_of, override_tree, read_tree
from megatron_paint.config.megatron import MegatronSettings
from megatron_paint.config.settings import EvaluateSettings, ModelSettings
from megatron_paint.evaluation.benchmarks import names_in
from megatron_paint.planning.local_model import base_of, with_local_model
from megatron_paint.planning.stages import DIVIDING, VIRTUAL

DEFAULT_OUT = "evaluations"


@dataclass(frozen=True, kw_only=True)
class Requested:
    """One evaluation of one model."""

    settings: EvaluateSettings
    model: str  # its name in reports
    folders: tuple[Path, ...]  # the weights: a complete model or checkpoint, or an adapter and its base
    benchmarks: tuple[str, ...]  # names or files
    out: Path


def requested(
    *,
    config: Path | None,
    model: Path | None,
    base: Path | None = None,
    benchmarks: str | None,
    samples: int | None,
    engine: str | None = None,
    out: Path | None,
    overrides: list[str],
) -> Requested:
    """The evaluation that the options ask for. UserError names an option that is missing.

    config: a settings file of an evaluation or of a training run. Its model and held-out problems are the defaults.
    model: a Hugging Face folder or a name on the hub, a PEFT adapter, or a Megatron checkpoint. base: the Hugging Face
    folder of an adapter or a Megatron checkpoint; None: the one that the adapter's config or the checkpoint names.
    """
    if config is None and model is None:
        raise UserError("evaluate needs a model: give --model FOLDER, or a settings file")
    tree = read_tree(config) if config is not None else {}
    if model is not None:
        _take_model(tree, model, base)
    elif base is not None:
        raise UserError("--base is the model that an adapter or a Megatron checkpoint belongs to: give --model too")
    if samples is not None:
        overrides = [*overrides, f"evaluation.samples={samples}"]
    if engine is not None:
        overrides = [*overrides, f"rollout.engine={engine}"]
        if engine != "vllm":
            (tree.get("rollout") or {}).pop("vllm", None)
    (tree.get("rollout") or {}).pop("lora_transfer", None)  # of a training run
    override_tree(tree, overrides)
    if model is not None and not tree["model"].get("hf_path"):
        raise UserError(
            f"model.hf_path is not set: {model} is a Megatron checkpoint that names no Hugging Face folder; give one "
            "with --base"
        )
    settings = with_local_model(evaluate_settings_of(tree))
    # An evaluation has no optimiser, and may have fewer processes than the training run of the settings.
    settings = replace(settings, megatron=replace(settings.megatron, num_distributed_optimizer_instances=1))
    held_out = settings.evaluation.problems
    if settings.rollout.engine == "vllm":
        _check_for_servers(settings)
        one = {f"{what}_parallel_size": 1 for what in ("tensor_model", "pipeline_model", "context", "expert_model")}
        undivided = (VIRTUAL, *DIVIDING, "expert_tensor_parallel_size")
        one |= {name: getattr(MegatronSettings, name) for name in undivided}
        settings = replace(settings, megatron=replace(settings.megatron, **one, sequence_parallel=False))
    names = names_in(benchmarks or "")
    if not names and held_out is None:
        raise UserError("evaluation.problems is not set: give --benchmarks aime24,FILE,..., or the file of problems")
    name = str(model or settings.model.megatron_path or settings.model.hf_path)
    return Requested(
        settings=settings,
        model=name,
        folders=_folders(settings.model),
        benchmarks=names or (held_out,),
        out=out or Path(DEFAULT_OUT) / Path(name).resolve().name,
    )


def _check_for_servers(settings: EvaluateSettings) -> None:
    """UserError: servers of vLLM cannot load the model as it is, or may hold another one."""
    model = settings.model
    if settings.rollout.vllm.urls:
        raise UserError(
            "rollout.vllm.urls names servers that already run, and they may hold the weights of a training run: leave "
            "it out, and the evaluation starts servers of its model"
        )
    if (part := model.megatron_path or model.adapter_path) is not None:
        converted = "convert it first (megatron-paint convert to-hf), or " if model.megatron_path else ""
        raise UserError(
            f"rollout.engine=vllm loads complete Hugging Face folders, and {part} is not one: {converted}evaluate it "
            "with --engine megatron"
        )


def _folders(model: ModelSettings) -> tuple[Path, ...]:
    if model.megatron_path is not None:
        return (megatron_folder(model.megatron_path),)
    return tuple(Path(path) for path in (model.adapter_path, model.hf_path) if path is not None)


def _take_model(tree: dict[str, Any], model: Path, base: Path | None) -> None:
    """Puts the model of `--model` into the settings. A checkpoint of a run also sets the sections model and prompts."""
    with about("--model"):
        folder = local_folder(model)
        if is_adapter(folder):
            _set(tree, hf_path=base or base_of(folder), adapter_path=folder)
            return
        if (folder / "config.json").is_file():
            if base is not None:
                raise UserError(f"{folder} is a complete model: leave --base out")
            _set(tree, hf_path=folder)
            return
        if not folder.exists():
            raise UserError(f"{folder} does not exist; of a run, give RUN/hf/step_... or RUN/checkpoints/step_...")
        folder = megatron_folder(folder)
        if not (folder / METADATA).is_file():
            raise UserError(
                f"{folder} is neither a Hugging Face folder (it has no config.json), nor a PEFT adapter (it has no "
                f"{ADAPTER_CONFIG}), nor a Megatron checkpoint (it has no {METADATA}); of a run, give RUN/hf/step_... "
                "or RUN/checkpoints/step_..."
            )
        _take_checkpoint(tree, folder)
    if base is not None:
        tree["model"]["hf_path"] = str(base)


def _set(tree: dict[str, Any], **paths: Path) -> None:
    """Replaces the model of the settings. Its adapters are not trained here: an adapter is merged."""
    kept = {key: value for key, value in (tree.get("model") or {}).items() if key not in ("megatron_path", "lora")}
    tree["model"] = kept | {"adapter_path": None} | {key: str(path) for key, path in paths.items()}


def _take_checkpoint(tree: dict[str, Any], folder: Path) -> None:
    if (folder / RUN_STATE).is_file():
        try:
            settings = json.loads((folder / RUN_STATE).read_text(encoding="utf-8"))["settings"]
            model, prompts = dict(settings["model"]), dict(settings["prompts"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder / RUN_STATE} is not readable ({error!r}); copy it again") from error
        tree["model"], tree["prompts"] = model, prompts
    # The checkpoint holds what the run made of the adapter that it started from.
    tree["model"] = {**(tree.get("model") or {}), "megatron_path": str(folder), "adapter_path": None}
