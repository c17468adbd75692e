"""Work that rank 0 does for all ranks."""

from collections.abc import Callable
from typing import Any

OnRankZero = Callable[[Callable[[], Any]], Any]  # runs a function on rank 0; all ranks get its result or its UserError


def directly(act: Callable[[], Any]) -> Any:
    """The `OnRankZero` of a single process: calls the function and returns its result."""
    return act()
