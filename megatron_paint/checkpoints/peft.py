"""The folder of a LoRA adapter in PEFT's format: tensor names, file names, config and tokenizer. It needs no torch."""

import json
import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_paint.base.errors import UserError
from megatron_paint.checkpoints.hub import hub_model

ADAPTER_FILE, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
MODEL_FILES = ("model.safetensors", "model.safetensors.index.json")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
PROJECTIONS = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
STACKED = ("gate_up_proj", "down_proj")  # parameters of a mixture with all experts of a layer
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
TOKENIZER_FILES += ("vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json")
TEMPLATES = "additional_chat_templates"  # a folder of transformers
# Keys of adapter_config.json that change nothing about the stored weights, or that `AdapterConfig` has.
READ = {"peft_type", "base_model_name_or_path", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"}
READ |= {"use_dora", "modules_to_save", "init_lora_weights", "bias", "target_parameters"}
HARMLESS = {"task_type", "revision", "lora_dropout", "inference_mode", "auto_mapping", "peft_version"}
HARMLESS |= {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "runtime_config"}
HARMLESS |= {"eva_config", "loftq_config", "megatron_core", "qalora_group_size"}
START_VALUES = (True, False, None, "gaussian", "orthogonal", "eva")  # of A and B; others also change the base's weights


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What adapter_config.json says about the adapter's weights."""

    base: str  # folder or name on the hub; empty: not named
    revision: str | None  # of the base on the hub
    targets: tuple[str, ...]  # modules that must have adapters; empty: the config names them in another way
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]  # regular expression of a module -> its rank
    alpha_pattern: Mapping[str, float]
    rank_stabilised: bool  # the scale is alpha / sqrt(rank), not alpha / rank
    dora: bool
    saved_modules: tuple[str, ...]  # modules whose complete weights the adapter holds
    stacked: tuple[str, ...]  # parameters with all experts of a layer that have adapters

    def rank_of(self, module: str) -> int:
        """The rank of a module, such as model.layers.0.mlp.up_proj."""
        return int(_by_pattern(self.rank_pattern, module, self.rank))

    def scale_of(self, module: str) -> float:
        """The factor of B A in the weight of a module."""
        rank = self.rank_of(module)
        return _by_pattern(self.alpha_pattern, module, self.alpha) / (math.sqrt(rank) if self.rank_stabilised else rank)


def _by_pattern(pattern: Mapping[str, float], module: str, default: float) -> float:
    """PEFT's rule: the first key that matches the end of the module's name, from a dot on."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds a PEFT adapter. UserError: it holds a complete model too, and either could be meant."""
    folder = Path(folder)
    if not (folder / ADAPTER_CONFIG).is_file():
        return False
    weights = next((name for name in MODEL_FILES if (folder / name).is_file()), None)
    if weights is not None:
        raise UserError(
            f"{folder} holds a complete model ({weights}) and a PEFT adapter ({ADAPTER_CONFIG}); move one of them to a "
            "separate folder"
        )
    return True


def read_adapter_config(folder: str | Path) -> AdapterConfig:
    """Reads `folder`/adapter_config.json. UserError: it is damaged, or names a feature that is not supported."""
    path = Path(folder) / ADAPTER_CONFIG
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        kind = raw.get("peft_type")
        if kind != "LORA":
            raise UserError(f"{path} is of peft_type {kind!r}; only LORA is supported: merge it with PEFT first")
        _refuse_unsupported(raw, path)
        config = AdapterConfig(
            base=str(raw.get("base_model_name_or_path") or ""),
            revision=raw.get("revision") or None,
            targets=_targets(raw),
            rank=int(raw["r"]),
            alpha=float(raw["lora_alpha"]),
            rank_pattern={key: int(value) for key, value in (raw.get("rank_pattern") or {}).items()},
            alpha_pattern={key: float(value) for key, value in (raw.get("alpha_pattern") or {}).items()},
            rank_stabilised=bool(raw.get("use_rslora")),
            dora=bool(raw.get("use_dora")),
            saved_modules=tuple(raw.get("modules_to_save") or ()),
            stacked=_stacked_targets(raw),
        )
        for pattern in (*config.rank_pattern, *config.alpha_pattern):
            re.compile(pattern)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{folder} has no {ADAPTER_CONFIG}: it is not a PEFT adapter") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, re.error) as error:
        raise UserError(f"{path} is not the config of a LoRA adapter ({error!r}); copy the adapter again") from None
    ranks = (config.rank, *config.rank_pattern.values())
    if min(ranks) < 1 or not all(map(math.isfinite, (config.alpha, *config.alpha_pattern.values()))):
        raise UserError(f"{path} has a rank below 1 or an alpha that is not finite; copy the adapter again")
    return config


def _targets(raw: Mapping[str, Any]) -> tuple[str, ...]:
    """The listed names of the adapted modules, unless some layers or modules are left out."""
    targets = raw.get("target_modules")
    some = any(raw.get(key) not in (None, [], "") for key in ("exclude_modules", "layers_to_transform"))
    return () if some or not isinstance(targets, list) else tuple(map(str, targets))


def _stacked_targets(raw: Mapping[str, Any]) -> tuple[str, ...]:
    """The stacked parameters of experts that are adapted."""
    names = tuple(map(str, raw.get("target_parameters") or ()))
    if other := [name for name in names if name.removeprefix("mlp.experts.") not in STACKED]:
        raise ValueError(
            f"target_parameters has {other[0]}, which is not supported; only mlp.experts."
            f"{' and mlp.experts.'.join(STACKED)} are"
        )
    return tuple(name for name in STACKED if any(target.endswith(name) for target in names))


def _refuse_unsupported(raw: Mapping[str, Any], path: Path) -> None:
    """Every key with a value that is not among the known ones is refused: it may change what the weights mean."""
    merge = "merge the adapter with PEFT (merge_and_unload) and give the merged model"
    if raw.get("bias", "none") != "none":
        raise UserError(f"{path}: bias={raw['bias']!r} is not supported, Qwen3's projections have no biases; {merge}")
    start = raw.get("init_lora_weights")
    if not any(start is known or (isinstance(known, str) and start == known) for known in START_VALUES):
        raise UserError(
            f"{path}: init_lora_weights={start!r} also changed the weights of the base, which are not in this folder; "
            f"{merge}, or convert it with PEFT's path_initial_model_for_weight_conversion"
        )
    for key, value in raw.items():
        if key not in READ | HARMLESS and value not in (None, False, [], {}, ""):
            raise UserError(f"{path}: {key}={value!r} is not supported; {merge}")


def adapter_name(weight: str, side: str) -> str:
    """Returns PEFT's name of the adapter `side` ("A" or "B") of a Hugging Face weight."""
    return f"base_model.model.{weight.removesuffix('.weight')}.lora_{side}.weight"


def write_config(
    folder: Path, *, rank: int, alpha: float, base: str | Path, mixture: bool = False, experts: bool = False
) -> None:
    """Writes the config of adapters on all seven projections. base: folder of the model that they belong to.

    mixture: on the attention's four; experts: on the experts too. A base in the cache of huggingface_hub is written as
    its name on the hub and its revision.
    """
    known = hub_model(base)
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": known.id if known else str(base),
        "revision": known.revision if known else None,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "target_modules": list(ATTENTION if mixture else PROJECTIONS),
        **({"target_parameters": [f"mlp.experts.{name}" for name in STACKED]} if experts else {}),
    }
    (folder / ADAPTER_CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def copy_tokenizer(base: Path, folder: Path) -> None:
    """Copies tokenizer and chat template of the base into an adapter's folder. UserError: the base cannot be read."""
    try:
        for name in TOKENIZER_FILES:
            if (base / name).is_file():
                shutil.copyfile(base / name, folder / name)  # copies the content without the permissions
        if (base / TEMPLATES).is_dir():
            # The base and an adapter that the run started from can both have such a folder.
            shutil.copytree(base / TEMPLATES, folder / TEMPLATES, copy_function=shutil.copyfile, dirs_exist_ok=True)
    except OSError as error:
        raise UserError(f"{base} cannot be read ({error}); an export copies its tokenizer") from error
