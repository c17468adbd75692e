"""The status of a run, read from its run folder, also while it runs: `megatron-paint status RUN`."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from megatron_paint.base.counts import agreeing, count_text
from megatron_paint.base.errors import UserError
from megatron_paint.config.saved import read_config
from megatron_paint.run.folder import RunFolder, step_name
from megatron_paint.run.live_line import duration
from megatron_paint.runtime.heartbeat import Heartbeat, read_heartbeats, slowest

RECENT = 20  # the speed is the median of so many steps
STALE_SECONDS = 120.0  # the watchdog writes every 10 seconds


@dataclass(frozen=True, kw_only=True)
class Status:
    """The status of a run."""

    folder: str
    state: str  # finished, running, hung, stopped, not begun
    step: int
    steps: int
    loss: float | None
    skipped: int
    seconds_per_step: float | None
    tokens_per_second: float | None
    seconds_left: float | None
    checkpoint: int | None
    checkpoint_age: float | None  # seconds
    damaged: tuple[str, ...]
    evaluation: tuple[int, float] | None  # step and Avg@n
    ranks: int
    oldest_progress: float | None  # seconds since the last progress of the rank that is behind
    behind: str
    attempts: tuple[dict[str, Any], ...]
    notices: tuple[str, ...]  # what is damaged, a line each


def read_status(path: Path, *, now: float | None = None) -> Status:
    """The status of the run in a folder. What is damaged becomes a notice.

    UserError: it is not a run folder, or its config.yaml has no number of steps.
    """
    folder, now = RunFolder(path), time.time() if now is None else now
    if not folder.config_file.exists():
        raise UserError(f"{path} is not a run folder: it has no config.yaml. Give the run.dir of a run")
    steps, notices = _planned(folder.config_file), []
    lines = folder.read_metrics()
    done = [line for line in lines if "skipped" not in line]
    step = max((line["step"] for line in lines), default=0)
    if bad := sum(_is_damaged(line) for line in done):
        notices.append(
            f"{folder.metrics_file.name}: {bad:,} of {count_text(len(done), 'step')} {agreeing(bad, 'has', 'have')} no "
            "loss or no tokens_per_second"
        )
    pace = _median([_seconds(line) for line in done[-RECENT:]])
    newest, heartbeats = folder.latest_checkpoint(), read_heartbeats(folder.heartbeats)
    last = slowest(heartbeats) if heartbeats else None
    return Status(
        folder=str(path),
        state=_state(step=step, steps=steps, checkpoint=newest, heartbeats=heartbeats, now=now),
        step=step,
        steps=steps,
        loss=_value(done[-1], "loss") if done else None,
        skipped=len(lines) - len(done),
        seconds_per_step=pace,
        tokens_per_second=_median([_value(line, "tokens_per_second") for line in done[-RECENT:]]),
        seconds_left=None if pace is None else pace * (steps - step),
        checkpoint=newest,
        checkpoint_age=None if newest is None else now - folder.checkpoint_folder(newest).stat().st_mtime,
        damaged=tuple(sorted(entry.name for entry in (path / "checkpoints").glob("damaged_*"))),
        evaluation=_evaluation(folder, notices),
        ranks=len(heartbeats),
        oldest_progress=None if last is None else now - last.since,
        behind="" if last is None else f"rank {last.rank} on {last.host}, step {last.step}, {last.phase}",
        attempts=tuple(folder.read_attempts()),
        notices=tuple(notices),
    )


def status_lines(status: Status) -> list[str]:
    """The status as lines of text."""
    is_running = status.state == "running" and status.seconds_left is not None
    left = f", about {duration(status.seconds_left)} left" if is_running else ""
    lines = [f"{status.folder}: {status.state}, step {status.step:,} of {status.steps:,}{left}"]
    if status.seconds_per_step is not None:
        lines.append(
            f"speed       {status.seconds_per_step:.3g} s a step, {_number(status.tokens_per_second)} tokens/s; "
            f"loss {_number(status.loss)}"
        )
    if status.skipped:
        lines.append(f"skipped     {count_text(status.skipped, 'step')}, which changed no weight")
    saved = (
        "none yet" if status.checkpoint is None else f"{step_name(status.checkpoint)}, {_ago(status.checkpoint_age)}"
    )
    damaged = f"; damaged: {', '.join(status.damaged)}" if status.damaged else ""
    lines.append(f"checkpoint  {saved}{damaged}")
    if status.evaluation is not None:
        lines.append(f"evaluation  {100 * status.evaluation[1]:.1f} % after step {status.evaluation[0]}")
    if status.ranks and status.state in ("running", "hung"):
        lines.append(
            f"heartbeats  {count_text(status.ranks, 'rank')}; furthest behind: {status.behind}, "
            f"{_ago(status.oldest_progress)}"
        )
    lines += [f"attempt     {_record_text(record)}" for record in status.attempts[-5:]]
    return lines + [f"damaged     {notice}" for notice in status.notices]


def _planned(config_file: Path) -> int:
    """run.steps of the run."""
    run = read_config(config_file).get("run")
    steps = run.get("steps") if isinstance(run, dict) else None
    if type(steps) is not int:
        raise UserError(
            f"{config_file} is damaged: its run.steps is {steps!r} and not an integer. A start of the run with its "
            "own settings shows what else differs"
        )
    return steps


def _state(*, step: int, steps: int, checkpoint: int | None, heartbeats: Sequence[Heartbeat], now: float) -> str:
    alive = bool(heartbeats) and now - max(heartbeat.written for heartbeat in heartbeats) < STALE_SECONDS
    if any(heartbeat.hung for heartbeat in heartbeats):
        return "hung"
    works = alive and any(heartbeat.phase != "end" for heartbeat in heartbeats)
    if step >= steps and checkpoint == steps and not works:
        return "finished"
    if works:
        return "running"
    return "stopped" if step or checkpoint else "not begun"


def _seconds(line: dict[str, Any]) -> float:
    return sum(_value(line, name) or 0.0 for name in line if name.startswith("time/"))


def _value(line: dict[str, Any], name: str) -> float | None:
    value = line.get(name)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _is_damaged(line: dict[str, Any]) -> bool:
    """Whether the line of a step has no loss or speed. A null is a number that was not finite."""
    return any(line.get(name, "") is not None and _value(line, name) is None for name in ("loss", "tokens_per_second"))


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _evaluation(folder: RunFolder, notices: list[str]) -> tuple[int, float] | None:
    """The newest evaluation that can be read. notices: gets a line for each newer one."""
    for step in reversed(folder.evaluated_steps()):
        try:
            average = _value(folder.read_eval(step).metrics, "avg")
        except (UserError, AttributeError):
            average = None
        if average is not None:
            return step, average
        notices.append(f"eval/{step_name(step)}.json has no evaluation that can be read")
    return None


def _record_text(record: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in record.items())


def _ago(seconds: float | None) -> str:
    return "" if seconds is None else f"{duration(max(0.0, seconds))} ago"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.4g}"
