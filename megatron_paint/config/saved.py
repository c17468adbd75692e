"""config.yaml of a run folder: the resolved settings, and which of them a resumed run may change."""

import dataclasses
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from megatron_paint.base.errors import UserError
from megatron_paint.config.settings import DataSettings, ModelSettings, RunSettings, Settings

# How long, how often and where; none of these changes what a step computes, but run.steps where a decay ends there.
FREE_RUN = {"dir", "steps", "save_every", "evaluate_every", "export_every", "resume", "tensorboard"}
FREE_RUN |= {"async_save", "keep_last", "keep_every", "exit_before_limit_s", "hang_timeout_s", "max_skipped_steps"}
FREE = {f"run.{name}" for name in FREE_RUN} | {
    "run.self_check_limit",
    "run.sampler_gap_limit",
    "megatron.tensor_model_parallel_size",
    "megatron.pipeline_model_parallel_size",
    "megatron.sequence_parallel",
    "megatron.overlap_grad_reduce",
    "megatron.recompute_granularity",
    "megatron.recompute_method",
    "megatron.recompute_num_layers",
    "megatron.distributed_timeout_minutes",
    # Sizes of what is held in memory at once: the result does not depend on them, and a run that ran out of memory
    # is resumed with smaller ones.
    "data.micro_batch_tokens",
    "objective.chunk_bytes",
    "objective.teacher.offload",
    "rollout.batch_size",
    "rollout.cache_bytes",
    "optimizer.decay_steps",  # compared together with run.steps
}
ABSENT = "(absent)"


def plain(settings: Any) -> dict[str, Any]:
    """Settings as nested dictionaries of YAML's own types; takes the dataclass or such a dictionary."""
    value = dataclasses.asdict(settings) if dataclasses.is_dataclass(settings) else settings
    return {key: plain(item) if isinstance(item, Mapping) else item for key, item in value.items()}


def to_yaml(settings: Any) -> str:
    """The text of config.yaml."""
    stream = io.StringIO()
    yaml = YAML(typ="safe")
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False
    yaml.width = 1000
    yaml.dump(plain(settings), stream)
    return stream.getvalue()


def read_yaml(path: Path) -> dict[str, Any]:
    """The dictionary in config.yaml. UserError: it is not there or not YAML."""
    try:
        content = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        raise UserError(f"Cannot read {path}: {error}; a run folder holds the settings of its run there") from error
    if not isinstance(content, dict):
        raise UserError(f"Cannot read {path}: it holds no settings; a run folder holds the settings of its run there")
    return content


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by dotted key."""
    keys: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            keys.update(flat(value, f"{prefix}{name}."))
        else:
            keys[prefix + name] = value
    return keys


def changed_keys(*, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What a resumed run may not change and does, each as "key: old -> new".

    A setting that an earlier version did not have stood, in effect, at its default.
    """
    before, after, defaults = flat(old), flat(new), _defaults()
    names = [name for name in {**before, **after} if name not in FREE]
    pairs = [(name, before.get(name, defaults.get(name, ABSENT)), after.get(name, ABSENT)) for name in names]
    return [f"{name}: {was!r} -> {now!r}" for name, was, now in pairs if was != now]


def _defaults() -> dict[str, Any]:
    smallest = Settings(model=ModelSettings(hf_path="-"), data=DataSettings(train="-"), run=RunSettings(dir="-"))
    needed = ("model.hf_path", "data.train", "run.dir")
    return {name: value for name, value in flat(plain(smallest)).items() if name not in needed}


def moved_decay(*, old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """What is wrong where a resumed run would end its decay elsewhere: the learning rate of every step would change."""
    before, after = flat(old), flat(new)
    was, now = (keys.get("optimizer.decay_steps") or keys["run.steps"] for keys in (before, after))
    if after["optimizer.decay"] == "constant" or was == now:
        return None
    return (
        f"optimizer.decay={after['optimizer.decay']} would end at step {now} (optimizer.decay_steps, else run.steps) "
        f"and not at step {was}, as in the run that is to be resumed: the learning rate of every step would change. "
        f"Set optimizer.decay_steps={was} to keep that schedule, with min_lr after it"
    )
