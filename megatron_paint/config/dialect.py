"""How a setting is declared: a type, a description, limits and a default, in a frozen class that is closed.

The description is part of the error messages and of docs/settings.md.
"""

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import ConfigDict, Field

CLOSED = ConfigDict(extra="forbid", allow_inf_nan=False)


def setting(description: str, **limits: Any) -> Any:
    """The meaning of one setting and its limits (`ge`, `gt`, `le`, `lt`), for `Annotated[type, setting(...)]`."""
    return Field(description=description, **limits)


# Strict: the text "3" is not a number, and 1 is not `true`.
Number = Annotated[float, Field(strict=True)]
Whole = Annotated[int, Field(strict=True)]
Flag = Annotated[bool, Field(strict=True)]
Text = Annotated[str, Field(strict=True, min_length=1)]
Positive = Annotated[Number, Field(gt=0)]
Count = Annotated[Whole, Field(ge=1)]


def settings_class(cls: type) -> type:
    """Makes a frozen keyword-only dataclass that refuses unknown keys and wrong types when it is read from a file."""
    cls.__pydantic_config__ = CLOSED
    return dataclass(frozen=True, kw_only=True)(cls)
