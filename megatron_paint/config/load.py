"""Reads settings: a YAML file, then `key=value` overrides, checked against `settings.py`; each mistake is one line.

A file may begin with `base: OTHER.yaml`, a path relative to itself. It then holds only what differs from that file.
"""

import dataclasses
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from megatron_paint.base.argument_parser import did_you_mean
from megatron_paint.base.errors import UserError
from megatron_paint.config import contradictions, offload, profile, vllm_contradictions
from megatron_paint.config.allow_changes import check_allow_changes
from megatron_paint.config.domains import DomainSettings, contradictions_of
from megatron_paint.config.megatron import MegatronSettings
from megatron_paint.config.mistakes import mistakes, user_error
from megatron_paint.config.objective import ObjectiveSettings
from megatron_paint.config.settings import (
    DataSettings,
    EvaluateSettings,
    EvaluationSettings,
    GradingSettings,
    ModelSettings,
    OptimizerSettings,
    RolloutSettings,
    RunSettings,
    Settings,
)


def load_settings(path: str | Path, overrides: Iterable[str] = ()) -> Settings:
    """Settings of a YAML file with overrides such as `optimizer.lr=1e-5`; UserError names each bad key."""
    overrides = list(overrides)
    for override in overrides:
        _parts(override)  # an unquoted path with a space is a wrong file and a wrong override: this one tells more
    return settings_of(override_tree(read_tree(path), overrides))


def override_tree(tree: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Puts overrides such as `optimizer.lr=1e-5` into the tree and returns it."""
    for override in overrides:
        _override(tree, override)
    return tree


def read_tree(path: str | Path) -> dict[str, Any]:
    """A settings file over its bases as nested dictionaries; nothing is checked except the YAML."""
    return _read_with_base(Path(path))


def settings_of(tree: Mapping[str, Any]) -> Settings:
    """Settings of nested dictionaries, complete and checked; UserError has one line for each mistake."""
    try:
        settings = TypeAdapter(Settings).validate_python(tree)
    except ValidationError as error:
        raise user_error(error, Settings) from None
    objective, rollout = _one_group_size(_resolved_objective(settings.objective, tree), settings.rollout, tree)
    settings = dataclasses.replace(settings, objective=objective, rollout=rollout)
    check_allow_changes(settings.run.allow_changes)
    _refuse(
        contradictions.of_views(objective, settings.data, settings.evaluation),
        contradictions.of_data(settings.data, objective),
        contradictions.of_lengths(settings.data, settings.rollout, objective),
        contradictions.of_ahead(rollout, settings.data, objective),
        vllm_contradictions.of_hang(rollout, settings.run),
        profile.contradictions_of(settings.run.profile, steps=settings.run.steps),
        contradictions.of_loggers(settings.run),
        contradictions.of_tokens(settings.run),
        _contradictions(settings.model, objective, rollout, settings.optimizer, settings.megatron),
        _of_domains(settings.domains, data=settings.data.domain, evaluation=settings.evaluation.domain),
    )
    return settings


def contradict(settings: Settings) -> bool:
    """Whether settings of several sections contradict each other, after a change to checked settings."""
    sections = (settings.model, settings.objective, settings.rollout, settings.optimizer, settings.megatron)
    return next(_contradictions(*sections), None) is not None


def evaluate_settings_of(tree: Mapping[str, Any]) -> EvaluateSettings:
    """Settings of an evaluation, from nested dictionaries: its own settings, or those of a training run.

    The sections `data`, `objective`, `optimizer` and `run` may be missing or incomplete. Their contents are checked.
    Only run.seed and data.micro_batch_tokens of them are used.
    """
    _check(tree, may_be_incomplete=("data", "run"))
    names = ("model", "prompts", "rollout", "megatron", "evaluation", "grading", "domains")
    used = {name: _section_of(tree, name) for name in names}
    objective = _resolved_objective(_section_of(tree, "objective"), tree)
    optimizer = _section_of(tree, "optimizer")
    _refuse(
        _contradictions(used["model"], objective, used["rollout"], optimizer, used["megatron"]),
        _of_domains(used["domains"], evaluation=used["evaluation"].domain),
    )
    return EvaluateSettings(
        **used,
        seed=tree.get("run", {}).get("seed", RunSettings.seed),
        micro_batch_tokens=tree.get("data", {}).get("micro_batch_tokens", DataSettings.micro_batch_tokens),
    )


def evaluation_section_of(tree: Mapping[str, Any]) -> EvaluationSettings:
    """The section `evaluation`. Other sections may be missing or incomplete; their contents are checked."""
    _check(tree, may_be_incomplete=("model", "data", "run"))
    return _section_of(tree, "evaluation")


def grading_section_of(tree: Mapping[str, Any]) -> GradingSettings:
    """The section `grading` of a tree that `evaluation_section_of` has checked."""
    return _section_of(tree, "grading")


def domains_of(tree: Mapping[str, Any]) -> dict[str, DomainSettings]:
    """The section `domains` of a tree that `evaluation_section_of` has checked. UserError: settings contradict."""
    domains = _section_of(tree, "domains")
    _refuse(_of_domains(domains, evaluation=_section_of(tree, "evaluation").domain))
    return domains


def _of_domains(domains: Mapping[str, DomainSettings], **defaults: str) -> Iterator[str]:
    """defaults: the domain of rows that name none, by their section."""
    return contradictions_of(domains, {f"{section}.domain": name for section, name in defaults.items()})


def _refuse(*found: Iterable[str]) -> None:
    """UserError with a line for each contradiction, if there is one."""
    if lines := list(chain(*found)):
        raise UserError("\n".join(lines))


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
    """The objective with the settings that its name implies."""
    return _opsd(objective, tree["objective"]) if objective.name == "opsd" else objective


def _opsd(objective: ObjectiveSettings, given: Mapping[str, Any]) -> ObjectiveSettings:
    """OPSD is PAINT that shows the complete solution and mixes no target; given: the section as the user wrote it."""
    rule, positions = given.get("reveal", {}).get("rule", "full"), given.get("loss", {}).get("positions", "none")
    if rule != "full" or positions != "none":
        raise UserError(
            f"objective.name=opsd shows the complete solution and mixes no target, but reveal.rule={rule} and "
            f"loss.positions={positions} are set: leave them out, or set objective.reveal.rule=full and "
            "objective.loss.positions=none"
        )
    return dataclasses.replace(
        objective,
        reveal=dataclasses.replace(objective.reveal, rule="full"),
        loss=dataclasses.replace(objective.loss, positions="none"),
    )


def _one_group_size(
    objective: ObjectiveSettings, rollout: RolloutSettings, tree: Mapping[str, Any]
) -> tuple[ObjectiveSettings, RolloutSettings]:
    """For GRPO, rollout.samples_per_problem becomes objective.grpo.samples_per_problem, its older name.

    So the settings of a run folder hold the number once, and a run that was started under one name resumes under the
    other.
    """
    size = rollout.samples_per_problem
    if objective.name != "grpo" or size is None:
        return objective, rollout
    if size < 2:
        raise UserError(
            f"rollout.samples_per_problem={size} leaves nothing to compare, and objective.name=grpo learns from the "
            "differences between the responses to a problem: set it to 2 or more, such as 8"
        )
    other = tree["objective"].get("grpo", {}).get("samples_per_problem", size)
    if other != size:
        raise UserError(
            f"rollout.samples_per_problem={size} and objective.grpo.samples_per_problem={other} are the same setting: "
            "leave one of them out"
        )
    group = dataclasses.replace(objective.grpo, samples_per_problem=size)
    return dataclasses.replace(objective, grpo=group), dataclasses.replace(rollout, samples_per_problem=None)


def _contradictions(
    model: ModelSettings,
    objective: ObjectiveSettings,
    rollout: RolloutSettings,
    optimizer: OptimizerSettings,
    megatron: MegatronSettings,
) -> Iterator[str]:
    """The checks that need several settings at once, of a run and of an evaluation alike."""
    yield from contradictions.of_reveal(objective.reveal)
    yield from contradictions.of_shown(objective, rollout)
    yield from contradictions.of_loss(objective)
    yield from contradictions.of_kept(objective, rollout)
    yield from contradictions.of_teacher(objective.teacher)
    yield from contradictions.of_rollout(rollout)
    yield from vllm_contradictions.of_lora_transfer(rollout, model)
    if objective.name == "grpo":
        yield from contradictions.of_grpo(objective, rollout)
    yield from contradictions.of_optimizer(optimizer)
    yield from contradictions.of_megatron(megatron, optimizer, model)
    yield from contradictions.of_replicas(megatron, model, objective)
    yield from contradictions.of_auxiliary_losses(megatron, model, objective)
    yield from offload.of_optimizer_state(megatron, optimizer, model)
    yield from offload.of_activation_offload(megatron)
    yield from offload.of_cuda_graphs(rollout, megatron)


def _read_with_base(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The file's tree merged over that of its base; above: the files that lead to this one as their base."""
    if path.resolve() in above:
        raise UserError(f"settings file {path} is its own base, by way of {above[-1]}: remove one `base:` line")
    tree = _read_yaml(path)
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise UserError(f"settings file {path}: base is {base!r}; it must be the path of another settings file")
    return merged_trees(_read_with_base(path.parent / base, (*above, path.resolve())), tree)


def merged_trees(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Merges section by section; a value or a list of `above` replaces that of `below`."""
    both = dict(below)
    for key, value in above.items():
        nested = isinstance(value, Mapping) and isinstance(both.get(key), Mapping)
        both[key] = merged_trees(both[key], value) if nested else value
    return both


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = did_you_mean(path.name, (file.name for file in path.parent.glob("*.y*ml")))
        raise UserError(f"settings file {path} does not exist{near and f': {near}'}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"settings file {path} cannot be read: {error}") from None
    except YAMLError as error:
        detail = " ".join(str(error).split()).split(" To suppress this check")[0]
        raise UserError(f"settings file {path} is not valid YAML: {detail}") from None
    if not isinstance(tree, dict):
        raise UserError(f"settings file {path} holds no settings: it must be sections such as model: and data:")
    return tree


def _parts(override: str) -> tuple[str, str]:
    """Key and value of an override. UserError: it is something else."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(
            f"override {override!r} is not key=value, such as optimizer.lr=1e-5: write no space around =, and a path "
            "with spaces in quotes"
        )
    return key, text


def _override(tree: dict[str, Any], override: str) -> None:
    key, text = _parts(override)
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
