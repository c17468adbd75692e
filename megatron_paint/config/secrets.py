"""Values that may be tokens or passwords. No run folder, no log and no logger gets them.

The settings themselves keep them: what a run writes goes through `recorded_tree`, and a command line through
`without_secret_arguments`.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_paint.config.saved import settings_tree

HIDDEN = "(hidden)"
ENVIRONMENT = "rollout.vllm.environment"
EXTRA_ARGUMENTS = ("rollout.vllm.extra_args", "rollout.vllm.command")
SECRET_WORDS = {"key", "token", "password", "secret"}  # in the name of an option, such as --api-key
IN_ADDRESS = re.compile(r"(?<=://)[^/@\s]+@")  # user and password of a URL


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
        words = _without_secret_options(value) if key in EXTRA_ARGUMENTS else value
        return [_hidden(word, key) for word in words]
    return without_credentials(value) if isinstance(value, str) else value


def without_credentials(text: str) -> str:
    """The text without user and password in its addresses."""
    return IN_ADDRESS.sub(f"{HIDDEN}@", text)


def _without_secret_options(words: Sequence[Any]) -> list[Any]:
    """Options of a command; the value of --api-key and the like is hidden, in one word with it or in the next one."""
    found, is_secret = [], False
    for word in words:
        name, equals, _ = str(word).partition("=")
        if name.startswith("-"):
            is_secret = bool(SECRET_WORDS & set(re.split("[-_]", name.lower())))
            found.append(f"{name}={HIDDEN}" if is_secret and equals else word)
        else:
            found.append(HIDDEN if is_secret else word)
            is_secret = False
    return found


def without_secret_arguments(arguments: Sequence[str]) -> list[str]:
    """Arguments of a command line. The values of settings that may hold secrets are hidden."""
    return [_without_secret_value(argument) for argument in arguments]


def _without_secret_value(argument: str) -> str:
    key, equals, _ = argument.partition("=")
    may_hold = key in ("rollout", "rollout.vllm", *EXTRA_ARGUMENTS) or f"{key}.".startswith(f"{ENVIRONMENT}.")
    return f"{key}={HIDDEN}" if equals and may_hold else without_credentials(argument)
