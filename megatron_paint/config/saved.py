"""config.yaml of a run folder: the complete settings of its run, and which of them a resumed run may change."""

import dataclasses
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from megatron_paint.base.errors import UserError
from megatron_paint.config.profile import ProfileSettings
from megatron_paint.config.settings import LONGEST_ANSWER, DataSettings, ModelSettings, RunSettings, Settings
from megatron_paint.config.tree import settings_tree

# What a resumed run may change: how long, how often and where. None of these changes what a step computes, except
# run.steps where a decay ends there; `moved_decay_end` checks this.
MAY_CHANGE_IN_RUN = {
    "dir",
    "steps",
    "save_every",
    "evaluate_every",
    "export_every",
    "resume",
    "allow_changes",
    "tensorboard",
    "loggers",
    "name",
    "project",
    "log_samples_every",
    "async_save",
    "keep_token_values",
    "keep_top_tokens",
}
MAY_CHANGE_IN_RUN |= {"keep_last", "keep_every", "exit_before_limit_s", "hang_timeout_s", "max_skipped_steps"}
MAY_CHANGE_IN_RUN |= {"sampler_gap_limit", "self_check_limit"}
MAY_CHANGE_IN_RUN |= {"profile", *(f"profile.{field.name}" for field in dataclasses.fields(ProfileSettings))}
MAY_CHANGE = {f"run.{name}" for name in MAY_CHANGE_IN_RUN} | {
    "megatron.tensor_model_parallel_size",
    "megatron.pipeline_model_parallel_size",
    "megatron.context_parallel_size",
    "megatron.virtual_pipeline_model_parallel_size",
    "megatron.num_layers_in_first_pipeline_stage",
    "megatron.num_layers_in_last_pipeline_stage",
    "megatron.account_for_embedding_in_pipeline_split",
    "megatron.account_for_loss_in_pipeline_split",
    "megatron.pipeline_model_parallel_layout",
    "megatron.expert_model_parallel_size",
    "megatron.expert_tensor_parallel_size",
    "megatron.sequence_parallel",
    "megatron.num_distributed_optimizer_instances",
    "megatron.overlap_grad_reduce",
    "megatron.overlap_param_gather",
    "megatron.recompute_granularity",
    "megatron.recompute_method",
    "megatron.recompute_num_layers",
    "megatron.distributed_timeout_minutes",
    # Where tensors are between two uses; no value changes.
    "megatron.cpu_offloading",
    "megatron.cpu_offloading_num_layers",
    "megatron.overlap_cpu_optimizer_d2h_h2d",
    "megatron.pin_cpu_grads",
    # Sizes of what is in memory at once. The result does not depend on them, except on micro_batch_tokens with an
    # auxiliary loss of routers, which is of each micro-batch. A run that ran out of memory resumes with smaller ones.
    "data.micro_batch_tokens",
    "objective.chunk_bytes",
    "objective.teacher.offload",
    "rollout.batch_size",
    "rollout.cache_bytes",
    "rollout.cuda_graphs",
    # How weights reach the servers; where these are is in `rollout.vllm`.
    "rollout.transfer_bytes",
    "rollout.lora_transfer",
    "optimizer.decay_steps",  # `moved_decay_end` compares it together with run.steps
}
MAY_CHANGE_ALL = ("rollout.vllm.",)  # sections
# What null means. A run accepts this length of an answer only if it fits, and null is this length wherever it fits.
MEANING_OF_NULL = {"evaluation.max_new_tokens": LONGEST_ANSWER, "rollout.samples_per_problem": 1}
# What a checkpoint itself holds: another value would be ignored, or the checkpoint would not fit.
IN_CHECKPOINT = {f"optimizer.{name}" for name in ("name", "beta1", "beta2", "eps", "momentum")}
IN_CHECKPOINT |= {"model.lora", "model.lora.rank", "model.lora.experts", "model.dtype", "model.adapter_path"}
IN_CHECKPOINT |= {"megatron.use_distributed_optimizer", "objective.name"}
# The groups of an offloaded optimiser have other entries.
IN_CHECKPOINT |= {"megatron.optimizer_cpu_offload"}
# Which sets of weights it has.
IN_CHECKPOINT |= {"objective.teacher.weights", "objective.teacher.ema_anchor"}
IN_CHECKPOINT |= {"objective.loss.support", "objective.loss.partner"}
DECAY_END = {"optimizer.decay_steps", "run.steps"}
ABSENT = "(absent)"


def to_yaml(settings: Any) -> str:
    """The text of config.yaml."""
    stream = io.StringIO()
    yaml = YAML(typ="safe")
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False
    yaml.width = 1000
    yaml.dump(settings_tree(settings), stream)
    return stream.getvalue()


def read_config(path: Path, *, use: str = "a run folder holds the settings of its run in this file") -> dict[str, Any]:
    """The dictionary in config.yaml, or in a file like it.

    use: what the file is for. UserError: it is missing or is not YAML.
    """
    try:
        content = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        raise UserError(f"Cannot read {path}: {' '.join(str(error).split())}; {use}") from error
    if not isinstance(content, dict):
        raise UserError(f"Cannot read {path}: it holds no settings; {use}")
    return content


def dotted(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested dictionaries by dotted key, such as optimizer.lr."""
    keys: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            keys.update(dotted(value, f"{prefix}{name}."))
        else:
            keys[prefix + name] = value
    return keys


def changes(*, old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Changed settings that a resumed run may change only if `run.allow_changes` names them: key -> (old, new).

    A setting that the version of the old run did not have counts as its default.
    """
    before, after, defaults = dotted(old), dotted(new), _defaults()
    names = [name for name in {**before, **after} if name not in MAY_CHANGE and not name.startswith(MAY_CHANGE_ALL)]
    pairs = {name: (before.get(name, defaults.get(name, ABSENT)), after.get(name, ABSENT)) for name in names}
    return {name: (was, now) for name, (was, now) in pairs.items() if _meant(name, was) != _meant(name, now)}


def _meant(name: str, value: Any) -> Any:
    return MEANING_OF_NULL.get(name) if value is None else value


def forbidden_changes(*, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Changed settings that this start may not change, each as "key: old -> new"."""
    allowed = _allowed(new)
    found = changes(old=old, new=new).items()
    return [f"{name}: {was!r} -> {now!r}" for name, (was, now) in found if not _is_allowed(name, allowed)]


def allowed_changes(*, old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Changed settings that `run.allow_changes` names: key -> (old, new). Also a moved end of the decay."""
    allowed = _allowed(new)
    found = {name: pair for name, pair in changes(old=old, new=new).items() if _is_allowed(name, allowed)}
    if _decay_ends(old) != _decay_ends(new) and allowed & DECAY_END:
        found["optimizer.decay_steps"] = (_decay_ends(old), _decay_ends(new))
    return found


def _allowed(settings: Mapping[str, Any]) -> set[str]:
    return set(settings.get("run", {}).get("allow_changes", ()))


def _is_allowed(name: str, allowed: set[str]) -> bool:
    """Whether a setting is named, or the section that it belongs to, which a setting can be as well (model.lora)."""
    return any(name == key or name.startswith(f"{key}.") for key in allowed)


def _smallest() -> dict[str, Any]:
    return settings_tree(
        Settings(model=ModelSettings(hf_path="-"), data=DataSettings(train="-"), run=RunSettings(dir="-"))
    )


def _defaults() -> dict[str, Any]:
    needed = ("model.hf_path", "data.train", "run.dir")
    return {name: value for name, value in dotted(_smallest()).items() if name not in needed}


def with_defaults(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Saved settings, with the defaults of those that the version which saved them did not have."""
    return _filled(_smallest(), tree)


def _filled(defaults: Mapping[str, Any], tree: Mapping[str, Any]) -> dict[str, Any]:
    filled = {**defaults, **tree}
    for name, value in tree.items():
        if isinstance(value, Mapping) and isinstance(defaults.get(name), Mapping):
            filled[name] = _filled(defaults[name], value)
    return filled


def moved_decay_end(*, old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """The error message if a resumed run would end its decay at another step, else None."""
    was, now = _decay_ends(old), _decay_ends(new)
    decay = new["optimizer"]["decay"]
    if decay == "constant" or was == now or _allowed(new) & DECAY_END:
        return None
    return (
        f"optimizer.decay={decay} would end at step {now} (optimizer.decay_steps, else run.steps) "
        f"and not at step {was}, as in the run before: the learning rate of every step would change. "
        f"Set optimizer.decay_steps={was} to keep that schedule and train with min_lr after it, or change it with "
        "run.allow_changes=[optimizer.decay_steps]"
    )


def _decay_ends(settings: Mapping[str, Any]) -> int:
    keys = dotted(settings)
    return keys.get("optimizer.decay_steps") or keys["run.steps"]
