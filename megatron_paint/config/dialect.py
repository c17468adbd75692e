"""How a setting is declared: type, description, source of the default and limits, in a frozen class that is closed.

Error messages, `megatron-paint settings` and docs/settings.md all print the description.
"""

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import ConfigDict, Field

CLOSED = ConfigDict(extra="forbid", allow_inf_nan=False)

# Where a default comes from.
OURS = "ours"
PAINT = "PAINT, arXiv 2604.26573"
OPSD = "OPSD, arXiv 2601.18734"
PW_OPSD = "PW-OPSD, arXiv 2605.21606"
OP2SD = "OP2SD, arXiv 2608.09228"
OASIS = "OASIS, arXiv 2609.37915"
OPSD_GRPO = "the GRPO baseline of OPSD, arXiv 2601.18734"
ADAMW = "AdamW's usual value"
MEGATRON = "Megatron-Core's name and default"
MEGATRON_NAME = "Megatron-Core's name; the default is ours"


def setting(description: str, *, source: str = OURS, **limits: Any) -> Any:
    """One setting, for `Annotated[type, setting(...)]`.

    description: its meaning. source: the publication or library that the default comes from. limits: `ge`, `gt`, `le`,
    `lt` of a number.
    """
    return Field(description=description, json_schema_extra={"source": source}, **limits)


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
