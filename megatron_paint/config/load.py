"""Reads settings: a YAML file, then `key=value` overrides, checked against `config.py`; a mistake is one line.

A file may begin with `base: OTHER.yaml`, a path relative to itself, and then says only what differs from that file.
"""

import dataclasses
import typing
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from megatron_paint.base.errors import UserError
from megatron_paint.config.mistakes import mistakes, user_error
from megatron_paint.config.settings import (
    DataSettings,
    EvaluateSettings,
    EvaluationSettings,
    MegatronSettings,
    ModelSettings,
    ObjectiveSettings,
    OptimizerSettings,
    RolloutSettings,
    RunSettings,
    Settings,
)


def load_settings(path: str | Path, overrides: Iterable[str] = ()) -> Settings:
    """Settings of a YAML file with overrides such as `optimizer.lr=1e-5`; UserError names each bad key."""
    return settings_of(override_tree(read_tree(path), overrides))


def override_tree(tree: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """The tree with overrides such as `optimizer.lr=1e-5` put in."""
    for override in overrides:
        _override(tree, override)
    return tree


def read_tree(path: str | Path) -> dict[str, Any]:
    """A settings file and its bases as nested dictionaries, unchecked."""
    return _read_with_base(Path(path))


def settings_of(tree: Mapping[str, Any]) -> Settings:
    """Settings of nested dictionaries, complete and checked."""
    try:
        settings = TypeAdapter(Settings).validate_python(tree)
    except ValidationError as error:
        raise user_error(error, Settings) from None
    settings = dataclasses.replace(settings, objective=_resolved_objective(settings.objective, tree))
    _refuse_contradictions(settings.model, settings.objective, settings.rollout, settings.optimizer, settings.megatron)
    return settings


def evaluate_settings_of(tree: Mapping[str, Any]) -> EvaluateSettings:
    """Settings of an evaluation, from nested dictionaries: its own settings, or those of a training run.

    The sections `data`, `objective`, `optimizer` and `run` may be missing or incomplete. Their contents are checked.
    Only run.seed and data.micro_batch_tokens of them are used.
    """
    _check(tree, may_be_incomplete=("data", "run"))
    used = {name: _section_of(tree, name) for name in ("model", "prompts", "rollout", "megatron", "evaluation")}
    objective = _resolved_objective(_section_of(tree, "objective"), tree)
    optimizer = _section_of(tree, "optimizer")
    _refuse_contradictions(used["model"], objective, used["rollout"], optimizer, used["megatron"])
    return EvaluateSettings(
        **used,
        seed=tree.get("run", {}).get("seed", RunSettings.seed),
        micro_batch_tokens=tree.get("data", {}).get("micro_batch_tokens", DataSettings.micro_batch_tokens),
    )


def evaluation_section_of(tree: Mapping[str, Any]) -> EvaluationSettings:
    """The section `evaluation`. Other sections may be missing or incomplete; their contents are checked."""
    _check(tree, may_be_incomplete=("model", "data", "run"))
    return _section_of(tree, "evaluation")


def _check(tree: Mapping[str, Any], *, may_be_incomplete: Collection[str]) -> None:
    """UserError for every mistake in the tree, except for keys that are missing in sections that may be incomplete."""
    try:
        TypeAdapter(Settings).validate_python(tree)
    except ValidationError as error:
        if found := mistakes(error, Settings, may_be_incomplete=may_be_incomplete):
            raise UserError("\n".join(found)) from None


def _section_of(tree: Mapping[str, Any], name: str) -> Any:
    """One section of a tree that was checked."""
    return TypeAdapter(typing.get_type_hints(Settings)[name]).validate_python(tree.get(name, {}))


def _resolved_objective(objective: ObjectiveSettings, tree: Mapping[str, Any]) -> ObjectiveSettings:
    """OPSD is PAINT that shows everything and interpolates nowhere. UserError: the tree contradicts that."""
    if objective.name == "opsd":
        given = tree.get("objective", {})
        rule, positions = given.get("reveal", {}).get("rule", "full"), given.get("loss", {}).get("positions", "none")
        if rule != "full" or positions != "none":
            raise UserError(
                f"objective.name=opsd shows the whole solution and interpolates nowhere, but reveal.rule={rule} and "
                f"loss.positions={positions} are set: leave them out, or set objective.reveal.rule=full and "
                "objective.loss.positions=none"
            )
        objective = dataclasses.replace(
            objective,
            reveal=dataclasses.replace(objective.reveal, rule="full"),
            loss=dataclasses.replace(objective.loss, positions="none"),
        )
    return objective


def _refuse_contradictions(
    model: ModelSettings,
    objective: ObjectiveSettings,
    rollout: RolloutSettings,
    optimizer: OptimizerSettings,
    megatron: MegatronSettings,
) -> None:
    """The checks that need several settings at once."""
    for wrong, message in _contradictions(model, objective, rollout, optimizer, megatron):
        if wrong:
            raise UserError(message)


def _contradictions(
    model: ModelSettings,
    objective: ObjectiveSettings,
    rollout: RolloutSettings,
    optimizer: OptimizerSettings,
    megatron: MegatronSettings,
) -> list[tuple[bool, str]]:
    reveal = objective.reveal
    return [
        (
            reveal.rule == "fixed" and reveal.share is None,
            "objective.reveal.share is not set: rule=fixed shows this share of each solution; set it in [0, 1]",
        ),
        (
            reveal.rule != "fixed" and reveal.share is not None,
            f"objective.reveal.share={reveal.share} belongs to rule=fixed, but rule={reveal.rule}; leave it out",
        ),
        (
            reveal.hidden_nats is not None and reveal.unit != "token",
            f"objective.reveal.hidden_nats={reveal.hidden_nats} is counted over tokens, but objective.reveal.unit="
            f"{reveal.unit}; set unit to token or hidden_nats to null",
        ),
        (
            objective.teacher.ema_anchor > 0 and objective.teacher.weights != "ema",
            f"objective.teacher.ema_anchor={objective.teacher.ema_anchor} belongs to weights=ema, but weights="
            f"{objective.teacher.weights}; leave it out",
        ),
        (
            rollout.engine == "replay" and rollout.path is None,
            "rollout.path is not set: engine=replay reads rollouts from this file",
        ),
        (
            rollout.engine != "replay" and rollout.path is not None,
            f"rollout.path belongs to engine=replay, but engine={rollout.engine}; leave it out",
        ),
        (
            objective.name == "grpo" and rollout.temperature == 0,
            "rollout.temperature=0 makes all responses of a group the same, and objective.name=grpo learns from their "
            "differences: set it above 0, such as 1.2",
        ),
        (
            objective.name == "grpo" and rollout.engine == "replay" and objective.grpo.importance_limit is not None,
            f"objective.grpo.importance_limit={objective.grpo.importance_limit} weighs by the sampler's "
            "log-probabilities, and rollouts read from a file have none: set it to null",
        ),
        (
            objective.name == "grpo" and objective.grpo.kl_weight > 0 and objective.teacher.weights == "current",
            f"objective.grpo.kl_weight={objective.grpo.kl_weight} keeps the model near the weights of objective.teacher"
            ", and with objective.teacher.weights=current these are its own: set it to initial or ema",
        ),
        (
            optimizer.min_lr > optimizer.lr,
            f"optimizer.min_lr={optimizer.min_lr} is above optimizer.lr={optimizer.lr}; it is where the decay ends",
        ),
        (
            optimizer.decay_steps is not None and optimizer.decay == "constant",
            f"optimizer.decay_steps={optimizer.decay_steps} is where a decay ends, but optimizer.decay=constant; leave "
            "it out, or set decay to linear or cosine",
        ),
        (
            optimizer.decay_steps is not None and optimizer.decay_steps <= optimizer.warmup_steps,
            f"optimizer.decay_steps={optimizer.decay_steps} must lie after optimizer.warmup_steps="
            f"{optimizer.warmup_steps}, where the decay begins: {optimizer.warmup_steps + 1} or more",
        ),
        (
            optimizer.name == "sgd" and megatron.use_distributed_optimizer,
            "optimizer.name=sgd has no state to shard: set megatron.use_distributed_optimizer=false",
        ),
        (
            megatron.recompute_granularity == "full"
            and (megatron.recompute_method is None or megatron.recompute_num_layers is None),
            "megatron.recompute_granularity=full needs recompute_method and recompute_num_layers (uniform, 1)",
        ),
        (
            megatron.fp8 is not None and model.dtype != "bfloat16",
            f"megatron.fp8 needs model.dtype=bfloat16, got {model.dtype}",
        ),
    ]


def _read_with_base(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The file's tree laid over that of its base, section by section; a list or a value replaces what was there."""
    if path.resolve() in above:
        raise UserError(f"settings file {path} is its own base, by way of {above[-1]}: leave one `base:` out")
    tree = _read_yaml(path)
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise UserError(f"settings file {path}: base is {base!r}; it must be the path of another settings file")
    return _laid_over(_read_with_base(path.parent / base, (*above, path.resolve())), tree)


def _laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    both = dict(below)
    for key, value in above.items():
        nested = isinstance(value, Mapping) and isinstance(both.get(key), Mapping)
        both[key] = _laid_over(both[key], value) if nested else value
    return both


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"settings file {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"settings file {path} cannot be read: {error}") from None
    except YAMLError as error:
        detail = " ".join(str(error).split()).split(" To suppress this check")[0]
        raise UserError(f"settings file {path} is not valid YAML: {detail}") from None
    if not isinstance(tree, dict):
        raise UserError(f"settings file {path} holds no settings: it must be sections such as model: and data:")
    return tree


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r} is not key=value, such as optimizer.lr=1e-5")
    try:
        value = YAML(typ="safe", pure=True).load(text) if text else None
    except YAMLError:
        value = text
    *sections, last = key.split(".")
    for section in sections:
        if tree.get(section) is None:
            tree[section] = {}
        tree = tree[section]
        if not isinstance(tree, dict):
            raise UserError(f"override {override!r}: {section} is a value, not a section")
    tree[last] = value
