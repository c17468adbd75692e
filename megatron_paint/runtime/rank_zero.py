"""Work that rank 0 does for all ranks."""

from collections.abc import Callable
from typing import Any

OnRankZero = Callable[[Callable[[], Any]], Any]  # runs a function on rank 0; all ranks get its result or its UserError


def directly(act: Callable[[], Any]) -> Any:
    """Where this process is the only one."""
    return act()
