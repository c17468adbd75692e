"""Values that may be tokens or passwords. What a run records and logs has "(hidden)" in their place.

The settings have the values, and so do the settings files that jobs and trials read (docs/operations.md). What a run
writes goes through `recorded_tree`, and a command line through `without_secret_arguments`.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_paint.config.tree import settings_tree

HIDDEN = "(hidden)"
ENVIRONMENT = "rollout.vllm.environment"
EXTRA_ARGUMENTS = ("rollout.vllm.extra_args", "rollout.vllm.command")
SECRET_WORDS = {"key", "apikey", "token", "password", "secret"}  # in the name of an option, such as --api-key
IN_ADDRESS = re.compile(r"(?<=://)[^/\s]+@")  # user and password of a URL; a password may have an @
# &name=value after the path of a URL
QUERY = re.compile(r"""(?P<name>[?&#][\w.-]*(?:key|token|password|secret)[\w.-]*=)[^&#\s"']+""", re.IGNORECASE)
# NAME=value in a command, as `env HF_TOKEN=...` has it
ASSIGNED = re.compile(
    r"""\b(?P<name>\w*(?:KEY|TOKEN|PASSWORD|SECRET)\w*)=(?:"[^"]*"|'[^']*'|[^\s;"'])+""",
    re.IGNORECASE,
)
# --api-key VALUE ... in the text of a shell, as `bash -c` gets it
SPACE, WORD = r"(?:[ \t]|\\\n)+(?!-)", r"""(?:"(?:\\.|[^"\\])*"|'[^']*'|\\.|[^\s;&|"'\\])+"""
OPTION = re.compile(
    r"(?<![\w-])(?P<name>--?(?:[a-z0-9]+[-_.])*(?:key|apikey|token|password|secret)(?:[-_.][a-z0-9]+)*)"
    rf"(?P<gap>=|{SPACE}){WORD}(?:{SPACE}{WORD})*",
    re.IGNORECASE,
)
# "name": value in JSON. Its quotes have a \ in the text of a shell.
PAIR = re.compile(
    r"""(?P<name>(?P<quote>\\*["'])(?P<key>[\w.-]+)(?P=quote)\s*:\s*)"""
    r"""(?P<value>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|\\+".*?\\+"|\[[^\]]*\]|\{[^{}]*\}|[^\s,{}\]]+)"""
)


def recorded_tree(settings: Any) -> dict[str, Any]:
    """`settings_tree` without secrets, whose place has "(hidden)": the values of `rollout.vllm.environment` and of
    options such as --api-key, and user, password and keys of addresses."""
    return without_secrets(settings_tree(settings))


def without_secrets(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings, or what config.yaml has, without secrets. prefix: of the keys, such as "rollout."."""
    return {name: _hidden(value, prefix + name) for name, value in tree.items()}


def _hidden(value: Any, key: str) -> Any:
    if isinstance(value, Mapping):
        if key == ENVIRONMENT:
            return dict.fromkeys(value, HIDDEN)
        return without_secrets(value, f"{key}.")
    if isinstance(value, list | tuple):
        words = without_secret_options(value) if key in EXTRA_ARGUMENTS else value
        return [_hidden(word, key) for word in words]
    return without_credentials(value) if isinstance(value, str) else value


def without_credentials(text: str) -> str:
    """The text without user and password in its addresses, and without keys and tokens after a `?` there."""
    return QUERY.sub(rf"\g<name>{HIDDEN}", IN_ADDRESS.sub(f"{HIDDEN}@", text))


def without_secret_options(words: Sequence[str]) -> list[str]:
    """Words of a command. Hidden are the values of --api-key and the like, in one word with it or in the next ones,
    what variables such as HF_TOKEN=... are set to, JSON values under such a name, and the secrets of addresses."""
    found, is_secret = [], False
    for word in words:
        name, equals, _ = word.partition("=")
        if name.startswith("-"):
            is_secret = _names_secret(name)
            found.append(f"{name}={HIDDEN}" if is_secret and equals else _without_secrets_inside(word))
        else:  # an option may have several values
            found.append(HIDDEN if is_secret else _without_secrets_inside(word))
    return found


def _names_secret(name: str) -> bool:
    """Whether a part of the name is one of SECRET_WORDS. Parts are those of api-key, api_key and apiKey."""
    parts = re.split("[-_.]", re.sub("(?<=[a-z])(?=[A-Z])", "-", name))
    return bool(SECRET_WORDS & {part.lower() for part in parts})


def _without_secrets_inside(word: str) -> str:
    """One word, which may be the text of a shell or JSON."""
    word = OPTION.sub(rf"\g<name>\g<gap>{HIDDEN}", PAIR.sub(_without_value, word))
    return without_credentials(ASSIGNED.sub(rf"\g<name>={HIDDEN}", word))


def _without_value(pair: re.Match[str]) -> str:
    """A pair of JSON. Numbers such as eos_token_id and num_key_value_heads stay, unless they are a password."""
    name, value = pair["name"], pair["value"]
    is_plain = re.fullmatch(r"null|true|false|-?[\d.]+", value) is not None
    if not _names_secret(pair["key"]) or (is_plain and "password" not in name.lower()):
        return name + PAIR.sub(_without_value, value)  # the value may have pairs itself
    return f"{name}{pair['quote']}{HIDDEN}{pair['quote']}"


def without_secret_arguments(arguments: Sequence[str]) -> list[str]:
    """Arguments of a command line. The values of settings that may hold secrets are hidden."""
    return [_without_secret_value(argument) for argument in arguments]


def _without_secret_value(argument: str) -> str:
    key, equals, _ = argument.partition("=")
    may_hold = key in ("rollout", "rollout.vllm", *EXTRA_ARGUMENTS) or f"{key}.".startswith(f"{ENVIRONMENT}.")
    return f"{key}={HIDDEN}" if equals and may_hold else without_credentials(argument)
