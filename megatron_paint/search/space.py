"""SPACE.yaml: which settings a search varies and how, how long a trial trains, and what it is measured on."""

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import TypeAdapter, ValidationError

from megatron_paint.base.errors import UserError
from megatron_paint.config import describe
from megatron_paint.config.dialect import Count, Flag, Number, Text, Whole, setting, settings_class
from megatron_paint.config.load import read_tree, settings_of
from megatron_paint.config.mistakes import user_error
from megatron_paint.config.saved import dotted
from megatron_paint.config.secrets import recorded_tree
from megatron_paint.config.settings import Settings
from megatron_paint.config.tree import settings_tree

# The search sets these itself, or they decide what an accuracy means.
FIXED = ("run", "evaluation", "grading")
ORDER_KEY = "data.seed"  # all trials have the same one, so that none is better by luck
TYPES = {"number": float, "integer": int}


@settings_class
class BudgetSettings:
    """How long a trial trains."""

    steps: Annotated[Count, setting("run.steps of a trial")]
    evaluate_every: Annotated[
        Count, setting("steps between the evaluations of a trial; after each, the trial may be pruned")
    ]


@settings_class
class ValidationSettings:
    """The problems that a search measures its trials on. The final comparison uses those of evaluation.problems."""

    problems: Annotated[Text, setting("evaluation.problems of a trial: what data.train takes, or a known benchmark")]
    limit: Annotated[Count | None, setting("number of problems, counted from the first one; null: all")] = None
    samples: Annotated[Count | None, setting("answers to each problem; null: evaluation.samples of the settings")] = (
        None
    )


@settings_class
class PrunerSettings:
    """When a trial is stopped early."""

    rule: Annotated[
        Literal["median", "halving", "none"],
        setting(
            "median: a trial stops if its best accuracy so far is below the median, at the same step, of the trials "
            "that trained to their end; halving: of the trials that reach a rung, one in `factor` continues to the "
            "next, which is `factor` times as long (successive halving); none: every trial trains to its end"
        ),
    ] = "median"
    startup_trials: Annotated[
        Whole, setting("rule=median stops no trial before so many have trained to their end", ge=1)
    ] = 4
    factor: Annotated[Whole, setting("rule=halving: between two rungs, the steps grow by this factor", ge=2)] = 2


@settings_class
class SamplerSettings:
    """How the settings of a trial are chosen: by Optuna's tree-structured Parzen estimator (TPE)."""

    startup_trials: Annotated[
        Whole, setting("after so many ended trials the estimator chooses; before that, settings are drawn", ge=1)
    ] = 8


@settings_class
class ParameterSettings:
    """The values of one setting: a range from low to high, or choices."""

    low: Annotated[Number | None, setting("smallest value of a range")] = None
    high: Annotated[Number | None, setting("largest value of a range")] = None
    log: Annotated[Flag, setting("draw the logarithm of the value uniformly, not the value")] = False
    step: Annotated[Number | None, setting("only low, low + step, low + 2 step, ... are used", gt=0)] = None
    choices: Annotated[
        tuple[bool | int | float | str | None, ...] | None, setting("a list of values, instead of a range")
    ] = None
    when: Annotated[
        dict[str, Any] | None,
        setting("the setting is varied only if another one has this value, or one of a list: KEY: VALUE"),
    ] = None


@settings_class
class SpaceSettings:
    """Everything in SPACE.yaml."""

    budget: BudgetSettings
    validation: ValidationSettings
    parameters: Annotated[dict[str, ParameterSettings], setting("the settings to vary, by their key")]
    pruner: PrunerSettings = field(default_factory=PrunerSettings)
    sampler: SamplerSettings = field(default_factory=SamplerSettings)


Value = bool | int | float | str | None


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One setting to vary, checked."""

    key: str
    whole: bool = False  # an integer setting
    low: float | None = None  # None: `choices` holds the values
    high: float | None = None
    log: bool = False
    step: float | None = None
    choices: tuple[Value, ...] = ()
    when: tuple[str, tuple[Value, ...]] | None = None  # another parameter, and its values under which this one is used

    @property
    def text(self) -> str:
        """The values in words."""
        if self.low is None:
            values = f"one of {', '.join(map(describe.yaml_text, self.choices))}"
        else:
            how = " logarithmically" if self.log else "" if self.step is None else f" in steps of {self.step:g}"
            values = f"{self.low:g} to {self.high:g}{how}"
        if self.when is None:
            return values
        return f"{values}; if {self.when[0]} is {' or '.join(map(describe.yaml_text, self.when[1]))}"

    def contains(self, value: Value) -> bool:
        """Whether a trial may have the value."""
        if self.low is None:
            return any(_same(value, choice) for choice in self.choices)
        if isinstance(value, bool) or not isinstance(value, int | float) or not self.low <= value <= self.high:
            return False
        steps = 0.0 if self.step is None else (value - self.low) / self.step
        return abs(steps - round(steps)) < 1e-8

    def applies(self, chosen: Mapping[str, Value]) -> bool:
        """Whether a trial with these values of the parameters above varies this one."""
        return self.when is None or (
            self.when[0] in chosen and any(_same(chosen[self.when[0]], value) for value in self.when[1])
        )

    @property
    def ends(self) -> tuple[Value, ...]:
        """The values that show whether all are allowed."""
        return self.choices if self.low is None else (self.low, self.high)


@dataclass(frozen=True, kw_only=True)
class Space:
    """A checked space, with the settings that its trials start from."""

    given: Settings
    settings: SpaceSettings
    parameters: tuple[Parameter, ...]
    unused: tuple[str, ...]  # keys whose `when` the given settings never meet

    @property
    def default(self) -> dict[str, Value]:
        """The parameters of trial 0: the given settings."""
        values = dotted(settings_tree(self.given))
        chosen: dict[str, Value] = {}
        for parameter in self.parameters:
            if parameter.applies(chosen):
                value = values[parameter.key]
                equal = (choice for choice in parameter.choices if _same(choice, value))
                chosen[parameter.key] = next(equal, value)  # 0 and 0.0 are one choice
        return chosen


def read_space(path: Path, given: Settings) -> Space:
    """The space of a file for trials that start from the given settings. `base:` works as in a settings file.

    UserError names what is wrong: a key, a value that a setting does not allow, settings outside their own space.
    """
    try:
        settings = TypeAdapter(SpaceSettings).validate_python(read_tree(path))
    except ValidationError as error:
        raise UserError(f"{path}: {user_error(error, SpaceSettings)}") from None
    try:
        return make_space(settings, given)
    except UserError as error:
        raise UserError("\n".join(f"{path}: {line}" for line in str(error).split("\n"))) from None


def make_space(settings: SpaceSettings, given: Settings) -> Space:
    """The same of settings that are read. UserError as above."""
    if not settings.parameters:
        raise UserError("parameters is empty: name the settings to vary, such as optimizer.lr: {low: 1e-6, high: 1e-4}")
    if settings.budget.steps < settings.budget.evaluate_every:
        raise UserError(
            f"budget.evaluate_every={settings.budget.evaluate_every} is above budget.steps={settings.budget.steps}: "
            "set it to a part of the steps"
        )
    _check_order(settings.parameters)
    found: list[Parameter] = []
    unused: list[str] = []
    for key, one in settings.parameters.items():
        parameter = _parameter(key, one, found, given)
        if parameter is None:
            unused.append(key)
        else:
            found.append(parameter)
    if not found:
        raise UserError(f"no parameter is left: {', '.join(unused)} need other settings (their `when`)")
    space = Space(given=given, settings=settings, parameters=tuple(found), unused=tuple(unused))
    _check_default(space)
    _check_values(space)
    return space


def trial_tree(space: Space, chosen: Mapping[str, Value], *, run_dir: str) -> dict[str, Any]:
    """The complete settings of a trial as nested dictionaries. UserError: the values contradict each other."""
    budget, validation = space.settings.budget, space.settings.validation
    tree = with_values(settings_tree(space.given), chosen)
    tree["run"] |= {
        "dir": run_dir,
        "steps": budget.steps,
        "evaluate_every": budget.evaluate_every,
        "save_every": budget.evaluate_every,  # a kill costs at most so many steps
        "keep_last": 1,
        "keep_every": None,
        "export_every": 0,
        "resume": "auto",
        "allow_changes": [],
    }
    evaluation = tree["evaluation"] | {"problems": validation.problems, "limit": validation.limit}
    if validation.samples is not None:
        evaluation["samples"] = validation.samples
    tree["evaluation"] = evaluation
    settings_of(tree)
    return tree


def with_values(tree: Mapping[str, Any], chosen: Mapping[str, Value]) -> dict[str, Any]:
    """A copy of nested settings in which these keys have these values."""
    changed = copy.deepcopy(dict(tree))
    for key, value in chosen.items():
        *sections, last = key.split(".")
        section = changed
        for name in sections:
            section = section[name]
        section[last] = value
    return changed


def _parameter(key: str, one: ParameterSettings, above: Sequence[Parameter], given: Settings) -> Parameter | None:
    """Checks one parameter. None: its `when` names a setting that is not varied and has another value."""
    described = _described(key, given)
    name = f"parameters.{key}"
    if mistake := next(_form_mistakes(one, described), None):
        raise UserError(f"{name}: {mistake}")
    when = None
    if one.when is not None:
        condition, values = _condition(name, one.when)
        parent = next((parameter for parameter in above if parameter.key == condition), None)
        if parent is None:
            fixed = dotted(settings_tree(given))
            if condition not in fixed:
                raise UserError(f"{name}.when: {describe.unknown(condition)}")
            if not any(_same(fixed[condition], value) for value in values):
                return None
        else:
            if wrong := [value for value in values if not parent.contains(value)]:
                raise UserError(
                    f"{name}.when: {condition} never is {describe.yaml_text(wrong[0])}; it is {parent.text}"
                )
            when = (condition, values)
    whole = described.type.startswith("integer")
    return Parameter(
        key=key,
        whole=whole,
        low=one.low,
        high=one.high,
        log=one.log,
        step=one.step,
        choices=one.choices or (),
        when=when,
    )


def _described(key: str, given: Settings) -> describe.SettingDescription:
    """What is known of the setting. UserError: it does not exist, or a search must not vary it."""
    section, _, _ = key.partition(".")
    found = [one for group in describe.find(key) for one in group.settings]
    if describe.general(key) != key:
        raise UserError(
            f"parameters.{key}: a search does not vary settings below a name of yours ({describe.general(key)}): "
            "leave it out"
        )
    if len(found) != 1 or found[0].key != key:
        raise UserError(f"parameters.{key}: {key} is a section; name one of its settings, such as {found[0].key}")
    if section in FIXED:
        raise UserError(
            f"parameters.{key}: a search does not vary the section {section}, because trials could not be compared, or "
            "because budget and validation set it: leave it out"
        )
    if key == ORDER_KEY:
        raise UserError(f"parameters.{key}: the best of several seeds is only luck: leave it out")
    if key not in dotted(settings_tree(given)):
        raise UserError(f"parameters.{key}: the settings have no section {key.rpartition('.')[0]}, which is null there")
    return found[0]


def _form_mistakes(one: ParameterSettings, described: describe.SettingDescription) -> Iterator[str]:
    """What is wrong with the form of a range or of choices."""
    is_range = one.low is not None or one.high is not None
    numeric = described.type.split(" ")[0] in TYPES
    if is_range == (one.choices is not None):
        yield "give either low and high, or choices"
    elif one.choices is not None:
        if one.log or one.step is not None:
            yield "log and step belong to a range: leave them out beside choices"
        if len(one.choices) < 2 or any(_same(a, b) for a, b in combinations(one.choices, 2)):
            yield "choices needs two values or more, each once"
    elif one.low is None or one.high is None:
        yield "a range needs both low and high"
    elif not numeric:
        yield f"{described.key} is no number ({described.type}): give choices"
    elif not one.low < one.high:
        yield f"low={one.low:g} must be below high={one.high:g}"
    elif one.log and one.low <= 0:
        yield f"log=true needs low above 0, got {one.low:g}"
    elif one.log and one.step is not None:
        yield "log and step exclude each other: leave one out"
    elif one.step is not None and not _whole_number((one.high - one.low) / one.step):
        yield f"step={one.step:g} does not divide the range from {one.low:g} to {one.high:g}"
    elif described.type.startswith("integer") and any(not _whole_number(v) for v in (one.low, one.high, one.step or 1)):
        yield f"{described.key} is an integer: low, high and step must be integers"


def _condition(name: str, when: Mapping[str, Any]) -> tuple[str, tuple[Value, ...]]:
    if len(when) != 1:
        raise UserError(f"{name}.when must be one KEY: VALUE or KEY: [VALUES], got {dict(when)!r}")
    ((condition, values),) = when.items()
    values = tuple(values) if isinstance(values, list | tuple) else (values,)
    if not values:
        raise UserError(f"{name}.when: {condition} has no value: give one, or a list of values")
    return condition, values


def _check_order(parameters: Mapping[str, ParameterSettings]) -> None:
    """A parameter depends only on those that are chosen before it."""
    keys = list(parameters)
    for number, (key, one) in enumerate(parameters.items()):
        for condition in one.when or {}:
            if condition in keys[number:]:
                raise UserError(f"parameters.{key}.when: name {condition} above {key}, which depends on it")


def _check_default(space: Space) -> None:
    """Trial 0 is the given settings, so they must lie in the space."""
    by_key = {parameter.key: parameter for parameter in space.parameters}
    for key, value in space.default.items():
        if not by_key[key].contains(value):
            raise UserError(
                f"parameters.{key}: the settings have {describe.yaml_text(value)}, which is not {by_key[key].text}. "
                "Trial 0 is the given settings: widen the space, or change the settings"
            )


def _check_values(space: Space) -> None:
    """UserError for a value that a setting does not allow, before any trial."""
    mistakes: list[str] = []
    for parameter in space.parameters:
        condition = {} if parameter.when is None else {parameter.when[0]: parameter.when[1][0]}
        for value in parameter.ends:
            chosen = condition | {parameter.key: _typed(parameter, value)}
            try:
                trial_tree(space, chosen, run_dir=space.given.run.dir)
            except UserError as error:
                mistakes.append(f"parameters.{parameter.key}: {error}")
    if mistakes:
        raise UserError("\n".join(dict.fromkeys(mistakes)))


def _typed(parameter: Parameter, value: Value) -> Value:
    return int(value) if parameter.whole and isinstance(value, float) else value


def _whole_number(value: float) -> bool:
    return abs(value - round(value)) < 1e-8


def _same(a: Any, b: Any) -> bool:
    """Equal, where true is not 1."""
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def search_tree(space: Space, *, seed: int) -> dict[str, Any]:
    """What a search of this seed is: the content of search.yaml, which a second start compares."""
    return {
        "seed": seed,
        "space": _without_null(dataclasses.asdict(space.settings)),
        "settings": recorded_tree(space.given),
    }


def _without_null(value: Any) -> Any:
    """Nested dictionaries and lists without empty settings of parameters. A null among choices stays."""
    if isinstance(value, Mapping):
        return {key: _without_null(item) for key, item in value.items() if item is not None}
    return [item for item in value] if isinstance(value, tuple) else value
