"""Waiting for something that another process does."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def until(condition: Callable[[], T], *, seconds: float, otherwise: Callable[[], str] = str, every: float = 0.2) -> T:
    """The first true value of `condition`, which is asked again after `every` seconds.

    Errors: AssertionError after so many seconds, with what `otherwise` then says.
    """
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"after {seconds:.0f} s: {otherwise()}"
        time.sleep(every)
    return value
