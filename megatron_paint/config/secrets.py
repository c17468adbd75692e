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
SECRET_WORDS = {"key", "token", "password", "secret"}  # in the name of an option, such as --api-key
IN_ADDRESS = re.compile(r"(?<=://)[^/\s]+@")  # user and password of a URL; a password may have an @
# NAME=value in a command, as `env HF_TOKEN=...` has it
ASSIGNED = re.compile(
    r"""\b(?P<name>\w*(?:KEY|TOKEN|PASSWORD|SECRET)\w*)=("[^"]*"|'[^']*'|[^\s;"']+)""",
    re.IGNORECASE,
)


def recorded_tree(settings: Any) -> dict[str, Any]:
    """`settings_tree` without secrets: the values of `rollout.vllm.environment`, of options such as --api-key, and user
    and password of addresses. Their place has "(hidden)"."""
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
    """The text without user and password in its addresses."""
    return IN_ADDRESS.sub(f"{HIDDEN}@", text)


def without_secret_options(words: Sequence[str]) -> list[str]:
    """Words of a command. Hidden are the values of --api-key and the like, in one word with it or in the next ones, and
    what variables such as HF_TOKEN=... are set to."""
    found, is_secret = [], False
    for word in words:
        name, equals, _ = word.partition("=")
        if name.startswith("-"):
            is_secret = bool(SECRET_WORDS & set(re.split("[-_]", name.lower())))
            found.append(f"{name}={HIDDEN}" if is_secret and equals else _without_assigned(word))
        else:  # an option may have several values
            found.append(HIDDEN if is_secret else _without_assigned(word))
    return found


def _without_assigned(word: str) -> str:
    return ASSIGNED.sub(rf"\g<name>={HIDDEN}", word)


def without_secret_arguments(arguments: Sequence[str]) -> list[str]:
    """Arguments of a command line. The values of settings that may hold secrets are hidden."""
    return [_without_secret_value(argument) for argument in arguments]


def _without_secret_value(argument: str) -> str:
    key, equals, _ = argument.partition("=")
    may_hold = key in ("rollout", "rollout.vllm", *EXTRA_ARGUMENTS) or f"{key}.".startswith(f"{ENVIRONMENT}.")
    return f"{key}={HIDDEN}" if equals and may_hold else without_credentials(argument)
