"""What is known of every setting: its key, type, default, limits, meaning, and who published the default."""

import dataclasses
import difflib
import functools
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from megatron_paint.base.errors import UserError
from megatron_paint.config.not_supported import NOT_SUPPORTED
from megatron_paint.config.settings import Settings

USERS_NAME = "NAME"  # in the key of a section that the user names
TYPES = {"string": "text", "number": "number", "integer": "integer", "boolean": "true or false"}
LIMITS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}


@dataclass(frozen=True, kw_only=True)
class SettingDescription:
    """One setting in words."""

    key: str  # dotted, such as optimizer.lr
    type: str  # such as "number or null"
    allowed: str  # limits or choices, "" where the type alone is enough
    default: Any  # None where `needed`
    needed: bool  # there is no default: the user sets it
    meaning: str
    source: str  # of the default: a publication, a library or "ours"; "" where `needed`

    @property
    def default_text(self) -> str:
        """The default as YAML, or that there is none."""
        return "none, must be set" if self.needed else yaml_text(self.default)


@dataclass(frozen=True, kw_only=True)
class SectionDescription:
    """One section: its dotted key, its meaning and its own settings, without those of sections inside it."""

    key: str
    meaning: str
    settings: tuple[SettingDescription, ...]


@functools.cache
def sections() -> tuple[SectionDescription, ...]:
    """All sections, in the order of the settings classes; an inner section follows the one that holds it."""
    return tuple(_sections("", Settings))


def find(key: str) -> tuple[SectionDescription, ...]:
    """The sections at or below a dotted key, or the section of one setting with this setting alone.

    UserError: there is no such key; the message suggests the nearest one.
    """
    key = general(key)
    if found := tuple(s for s in sections() if s.key == key or s.key.startswith(f"{key}.")):
        return found
    for section in sections():
        if own := tuple(setting for setting in section.settings if setting.key == key):
            return (dataclasses.replace(section, settings=own),)
    raise UserError(unknown(key))


def general(key: str) -> str:
    """The key with NAME in place of a name that the user chose: domains.NAME.grader for domains.code.grader."""
    for section in sections():
        before = section.key.removesuffix(f".{USERS_NAME}")
        if before != section.key and key.startswith(f"{before}."):
            first, _, rest = key.removeprefix(f"{before}.").partition(".")
            return f"{section.key}.{rest}" if first and rest else section.key
    return key


def unknown(key: str) -> str:
    """The message about a key that does not exist: why, or the nearest one."""
    if key in NOT_SUPPORTED:
        return f"{key} {NOT_SUPPORTED[key]}"
    return f"unknown setting {key}: {_suggestion(key)}"


def yaml_text(value: Any) -> str:
    """A value as it is written in a settings file."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(yaml_text, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name}: {yaml_text(item)}' for name, item in value.items())}}}"
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    return str(value)


def _suggestion(key: str) -> str:
    keys = [key for section in sections() for key in (section.key, *(setting.key for setting in section.settings))]
    last = key.rpartition(".")[2]
    same_name = [known for known in keys if known.rpartition(".")[2] == last]
    close = same_name or difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
    close = close or [
        known for known in keys if difflib.get_close_matches(last, [known.rpartition(".")[2]], cutoff=0.6)
    ]
    if close:
        return f"did you mean {' or '.join(dict.fromkeys(close))}?"
    return "megatron-paint settings prints all keys"


def _sections(prefix: str, section: type) -> Iterator[SectionDescription]:
    own, inner = [], []
    hints = typing.get_type_hints(section, include_extras=True)
    for field in dataclasses.fields(section):
        key = f"{prefix}.{field.name}" if prefix else field.name
        nested = _nested(hints[field.name])
        if nested is None or field.default is None:  # a section that may be null is a setting as well
            own.append(_setting(key, hints[field.name], field, section=nested))
        if nested is not None:
            inner.append((f"{key}.{USERS_NAME}" if _is_mapping(hints[field.name]) else key, nested))
    if prefix:
        yield SectionDescription(key=prefix, meaning=_first_line(section), settings=tuple(own))
    for key, nested in inner:
        yield from _sections(key, nested)


def _nested(hint: Any) -> type | None:
    """The settings class in a type, such as LoraSettings in `Annotated[LoraSettings | None, ...]`."""
    if dataclasses.is_dataclass(hint):
        return hint
    return next((found for part in typing.get_args(hint) if (found := _nested(part)) is not None), None)


def _is_mapping(hint: Any) -> bool:
    """Whether the sections of a type have names that the user chooses."""
    return typing.get_origin(hint) is dict


def _first_line(section: type) -> str:
    return (section.__doc__ or "").split("\n", 1)[0]


def _setting(key: str, hint: Any, field: dataclasses.Field, *, section: type | None) -> SettingDescription:
    info = next(part for part in hint.__metadata__ if getattr(part, "description", None))
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    needed = default is dataclasses.MISSING
    kind, allowed = ("section or null", "") if section else _type_and_limits(TypeAdapter(hint).json_schema())
    return SettingDescription(
        key=key,
        type=kind,
        allowed=allowed,
        default=None if needed else list(default) if isinstance(default, tuple) else default,
        needed=needed,
        meaning=info.description,
        source="" if needed else info.json_schema_extra["source"],
    )


def _type_and_limits(schema: Mapping[str, Any]) -> tuple[str, str]:
    """A JSON schema in words: ("number or null", "at least 0, below 1")."""
    options = schema.get("anyOf", [schema])
    some = next(option for option in options if option.get("type") != "null")
    null = " or null" if len(options) > 1 else ""
    if "enum" in some:
        return f"choice{null}", ", ".join(some["enum"])
    if some["type"] == "array":
        return f"list of {TYPES[some['items']['type']]}{null}", ""
    if some["type"] == "object":
        return f"{TYPES[some['additionalProperties']['type']]} by name", ""
    limits = [f"{word} {yaml_text(float(some[name]))}" for name, word in LIMITS.items() if name in some]
    return f"{TYPES[some['type']]}{null}", ", ".join(limits)
