"""Settings as nested dictionaries. It imports no YAML: an environment of vLLM need not have the library."""

import dataclasses
from collections.abc import Mapping
from typing import Any


def settings_tree(settings: Any) -> dict[str, Any]:
    """Settings as nested dictionaries of YAML's own types. Accepts a settings class or such a dictionary."""
    value = dataclasses.asdict(settings) if dataclasses.is_dataclass(settings) else settings
    return {key: _plain(item) for key, item in value.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return settings_tree(value)
    return list(value) if isinstance(value, tuple) else value
