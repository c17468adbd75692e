"""How work is done once and not on every rank."""

from collections.abc import Callable
from typing import Any

Share = Callable[[Callable[[], Any]], Any]  # has one rank act; its result, or its UserError, reaches all ranks


def directly(act: Callable[[], Any]) -> Any:
    """Where this process is the only one."""
    return act()
