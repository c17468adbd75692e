"""Numbers and settings as a search prints them."""

from collections.abc import Mapping

from megatron_paint.config.describe import yaml_text
from megatron_paint.evaluation.statistics import Interval
from megatron_paint.search.space import Value


def value_text(value: Value) -> str:
    """A value, with four digits."""
    return f"{value:.4g}" if isinstance(value, float) else yaml_text(value)


def chosen_text(chosen: Mapping[str, Value]) -> str:
    """The values of a trial, as overrides."""
    return " ".join(f"{key}={value_text(value)}" for key, value in chosen.items())


def percent(share: float) -> str:
    """A share in per cent."""
    return f"{100 * share:.1f} %"


def with_interval(found: Interval, *, sign: bool = False) -> str:
    """A share or a difference of shares in per cent, with its interval."""
    form = "+.1f" if sign else ".1f"
    return f"{100 * found.mean:{form}} [{100 * found.low:{form}}, {100 * found.high:{form}}]"


def p_text(p_value: float) -> str:
    """A p-value with its sign of comparison."""
    return f"= {p_value:.4f}" if p_value >= 1e-4 else "< 0.0001"
