"""Words for what pydantic finds wrong: one line a mistake, with the key, its meaning, the value and what must hold."""

import dataclasses
import difflib
import functools
import typing
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError, create_model

from megatron_paint.base.errors import UserError
from megatron_paint.config.dialect import CLOSED
from megatron_paint.config.not_supported import NOT_SUPPORTED

MISSING = ("missing", "missing_keyword_only_argument")  # pydantic's types of an error where a key is not set


def user_error(error: ValidationError, root: type, prefix: str = "") -> UserError:
    """All mistakes of one check as a UserError, one line each.

    root: the settings class that was checked; prefix: the dotted key of that class, "" for all settings.
    """
    return UserError("\n".join(mistakes(error, root, prefix)))


def mistakes(
    error: ValidationError, root: type, prefix: str = "", *, may_be_incomplete: Collection[str] = ()
) -> list[str]:
    """The same as lines, without repeats. may_be_incomplete: sections in which a key may be missing."""
    found = [e for e in error.errors() if e["type"] not in MISSING or e["loc"][0] not in may_be_incomplete]
    return list(dict.fromkeys(_explain(e, root, prefix) for e in found))


def check_fields(section: Any, prefix: str) -> None:
    """Checks a section that was made in Python as if it came from a file; UserError for wrong types and limits.

    prefix: the dotted key of the section, such as objective.loss.
    """
    values = {field.name: getattr(section, field.name) for field in dataclasses.fields(section)}
    try:
        _fields_model(type(section)).model_validate(values)
    except ValidationError as error:
        raise user_error(error, type(section), prefix) from None


@functools.cache
def _fields_model(section: type) -> type[BaseModel]:
    hints = typing.get_type_hints(section, include_extras=True)
    fields = {field.name: (hints[field.name], ...) for field in dataclasses.fields(section)}
    return create_model(section.__name__, __config__=CLOSED, **fields)


def unknown_setting(key: str, names: Iterable[str]) -> str:
    """The message for a key that does not exist; names: the keys that exist in its section."""
    if key in NOT_SUPPORTED:
        return f"{key} {NOT_SUPPORTED[key]}"
    parent, _, name = key.rpartition(".")
    close = difflib.get_close_matches(name, sorted(names), n=1, cutoff=0.5)
    dotted = f"{parent}." if parent else ""
    hint = f"did you mean {dotted}{close[0]}?" if close else f"known here: {', '.join(sorted(names))}"
    return f"unknown setting {key}: {hint}"


def _explain(error: Mapping[str, Any], root: type, prefix: str) -> str:
    """One line for one of pydantic's findings."""
    limits = error.get("ctx", {})
    if isinstance(limits.get("error"), UserError):  # a section that checks its own combinations
        return str(limits["error"])
    parts = [prefix] if prefix else []
    key = ".".join(parts + [str(part) for part in error["loc"] if not str(part).startswith("function-")])
    kind, got = error["type"], error.get("input")
    shown = "nothing (null)" if got is None else repr(got)
    section, name = _section(error["loc"], root)
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        return unknown_setting(key, {field.name for field in dataclasses.fields(section)} if section else set())
    meaning = f" ({m})" if (m := _meaning(section, name)) else ""
    if kind in MISSING:
        return f"{key} is not set{meaning}: it has no default, set it in the settings file or as {key}=..."
    if kind.startswith("dataclass") and not isinstance(got, Mapping):
        return f"{key} is a section of settings, got {shown}"
    if kind == "finite_number":
        return f"{key}{meaning}: got {shown}; it must be a finite number"
    if kind == "tuple_type":
        return f"{key}{meaning}: got {shown}; it must be a list, such as [{got}]"
    nearest = next((f"; the nearest valid value is {limits[k]}" for k in ("ge", "le") if k in limits), "")
    requirement = error["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    requirement = "a text" if kind == "string_type" else requirement
    return f"{key}{meaning}: got {shown}; it must be {requirement}{nearest}"


def _section(location: tuple, root: type) -> tuple[type | None, str]:
    """The settings class that the last part of the location belongs to, and that part."""
    section: type | None = root
    for part in location[:-1]:
        if not (section and dataclasses.is_dataclass(section)):
            return None, str(location[-1])
        hint = typing.get_type_hints(section).get(str(part))
        if hint is None:
            continue
        options = [hint, *typing.get_args(hint)]
        section = next((option for option in options if dataclasses.is_dataclass(option)), None)
    return section, str(location[-1])


def _meaning(section: type | None, name: str) -> str:
    if section is None:
        return ""
    hint = typing.get_type_hints(section, include_extras=True).get(name)
    infos = getattr(hint, "__metadata__", ())
    return next((info.description for info in infos if getattr(info, "description", None)), "")
