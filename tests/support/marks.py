"""Marks of parameters."""

from collections.abc import Container, Iterable

import pytest


def long_if_in(long: Container[str], names: Iterable[str]) -> list:
    """The names as parameters of a test. Those in `long` have the mark of this name: `make test` leaves them out."""
    return [pytest.param(name, marks=pytest.mark.long) if name in long else name for name in names]
