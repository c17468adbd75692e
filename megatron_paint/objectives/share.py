"""How an objective has work done once and not on every rank."""

from collections.abc import Callable
from typing import Any

Share = Callable[[Callable[[], Any]], Any]


def directly(act: Callable[[], Any]) -> Any:
    """Where this process is the only one."""
    return act()
