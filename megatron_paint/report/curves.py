"""Which metrics share a plot, and the series that the report computes from them."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_paint.objectives.metric_table import METRICS

Line = Mapping[str, Any]
TIME = "time/"
LARGEST = sys.float_info.max
MOST_DIGITS = 6  # significant digits of a value in the report


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a plot."""

    key: str  # of metrics.jsonl, or of `derived`
    label: str


@dataclass(frozen=True, kw_only=True)
class Plot:
    """One plot. It appears if a run has a value of one of its series."""

    id: str
    title: str
    unit: str
    series: tuple[Series, ...]
    log: bool = False  # whether a logarithmic scale is what most readers want
    share: bool = False  # whether the values are shares from 0 to 1
    zero: bool = False  # whether the scale begins at 0


def _series(**labels: str) -> tuple[Series, ...]:
    """Series by label; a key has / where the name of an argument has __."""
    return tuple(Series(key=key.replace("__", "/"), label=label) for key, label in labels.items())


PLOTS = (
    Plot(id="loss", title="Loss", unit="nats a token", series=_series(loss="loss")),
    Plot(
        id="divergence",
        title="Divergence to the target",
        unit="nats a token",
        series=_series(divergence__selected_mean="selected tokens", divergence__other_mean="other tokens"),
        log=True,
    ),
    Plot(
        id="overlap",
        title="Overlap and reveal",
        unit="share",
        series=_series(
            overlap__mean="overlap", reveal__mean="reveal", anchors__none_share="references without an anchor"
        ),
        share=True,
    ),
    Plot(
        id="entropy",
        title="Entropy",
        unit="nats",
        series=_series(entropy__student_mean="student", entropy__teacher_mean="teacher", entropy__gap="difference"),
    ),
    Plot(
        id="reward",
        title="Right responses",
        unit="share",
        series=_series(
            reward__mean="reward", order__accuracy="accuracy of the order", reward__equal_groups_share="equal groups"
        ),
        share=True,
    ),
    Plot(id="length", title="Response length", unit="tokens", series=_series(response__length_mean="mean length")),
    Plot(
        id="truncated",
        title="Cut-off responses",
        unit="share",
        series=_series(response__truncated_share="cut off", response__no_answer_share="without a final answer"),
        share=True,
    ),
    Plot(
        id="outside",
        title="Mass outside the support",
        unit="share",
        series=_series(support__outside_mass="outside the support"),
        share=True,
    ),
    Plot(id="support", title="Size of the support", unit="entries", series=_series(support__size="entries")),
    Plot(id="grad_norm", title="Gradient norm", unit="", series=_series(grad_norm="before clipping"), log=True),
    Plot(
        id="sampler_gap",
        title="Sampler and trainer",
        unit="nats",
        series=_series(sampler_gap__max="largest difference", sampler_gap__mean="mean difference"),
        log=True,
    ),
    Plot(
        id="clip",
        title="Clipped mass",
        unit="share",
        series=_series(clip__share="clipped", ratio__clipped_share="clipped ratios"),
        share=True,
    ),
    Plot(id="kept", title="Responses that are trained on", unit="responses", series=_series(rollout__kept="kept")),
    Plot(id="lr", title="Learning rate", unit="", series=_series(lr="learning rate")),
    Plot(
        id="memory",
        title="Memory of rank 0",
        unit="GB",
        series=_series(memory__host_gb="host", memory__device_gb="device"),
        zero=True,
    ),
    Plot(id="speed", title="Speed", unit="tokens a second", series=_series(tokens_per_second="tokens a second")),
)
# What no plot of the second group shows: counts that other metrics repeat.
UNPLOTTED = {"step", "num_tokens", "skipped"}


def columns(lines: Sequence[Line]) -> dict[str, list[float | None]]:
    """The metrics of all steps by key, with the derived ones. None where a step has no value.

    A series that never has a value is left out.
    """
    full = [{**line, **derived(line)} for line in lines]
    keys = dict.fromkeys(key for line in full for key, value in line.items() if is_number(value))
    return {key: [_rounded(line.get(key)) for line in full] for key in keys if key != "step"}


def derived(line: Line) -> dict[str, float]:
    """The difference of entropies (student - teacher), and the seconds of a step outside of its phases."""
    found: dict[str, float] = {}
    student, teacher = line.get("entropy/student_mean"), line.get("entropy/teacher_mean")
    if is_number(student) and is_number(teacher):
        found["entropy/gap"] = student - teacher
    tokens, speed = line.get("num_tokens"), line.get("tokens_per_second")
    phases = [value for key, value in line.items() if key.startswith(TIME) and is_number(value)]
    if phases and is_number(tokens) and is_number(speed) and speed > 0:
        found[f"{TIME}other_s"] = max(0.0, tokens / speed - sum(phases))
    return found


def phases(keys: Sequence[str]) -> list[str]:
    """The keys of the phases among the keys of a run, in the order of a step; `other` is the last one."""
    known = [key for key in METRICS if key.startswith(TIME)]
    found = [key for key in keys if key.startswith(TIME)]
    last = f"{TIME}other_s"
    return sorted(found, key=lambda key: (key == last, known.index(key) if key in known else len(known)))


def plots_for(keys: Sequence[str]) -> list[dict[str, Any]]:
    """The plots of runs that have these keys: the chosen ones, then one for each key that is left (`more`)."""
    there = set(keys)
    chosen = []
    for plot in PLOTS:
        series = [asdict(one) for one in plot.series if one.key in there]
        if series:
            chosen.append({**asdict(plot), "series": series, "more": False})
    shown = {one.key for plot in PLOTS for one in plot.series} | UNPLOTTED
    rest = [key for key in keys if key not in shown and not key.startswith(TIME)]
    for key in rest:
        unit = METRICS[key].unit if key in METRICS else ""
        plot = Plot(id=f"more-{key}", title=key, unit="" if unit == "-" else unit, series=(Series(key=key, label=key),))
        chosen.append({**asdict(plot), "more": True})
    return chosen


def meanings(keys: Sequence[str]) -> dict[str, str]:
    """What each key means, with its healthy range."""
    own = {
        "entropy/gap": "entropy of the student minus entropy of the teacher, of the means over response tokens",
        f"{TIME}other_s": "time of the step outside of its phases",
    }
    return {key: _meaning(key, own) for key in keys if key in METRICS or key in own}


def _meaning(key: str, own: Mapping[str, str]) -> str:
    if key in own:
        return own[key]
    metric = METRICS[key]
    return metric.meaning if metric.healthy == "-" else f"{metric.meaning}. Healthy: {metric.healthy}"


def is_number(value: Any) -> bool:
    """Whether it is a number that a browser has too; a damaged file may hold 1e999 or an integer of 400 digits."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST <= value <= LARGEST


def _rounded(value: Any) -> float | None:
    return float(f"{value:.{MOST_DIGITS}g}") if is_number(value) else None
