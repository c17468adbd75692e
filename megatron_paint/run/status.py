"""What a run folder says about its run, also while it runs: `megatron-paint status RUN`."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from megatron_paint.base.errors import UserError
from megatron_paint.config.saved import read_config
from megatron_paint.run.console import duration
from megatron_paint.run.folder import RunFolder, step_name
from megatron_paint.runtime.heartbeat import Beat, read_beats, slowest

RECENT = 20  # steps that the speed is the median of
STALE_SECONDS = 120.0  # a heart writes every 10


@dataclass(frozen=True, kw_only=True)
class Status:
    """Where a run stands."""

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
    oldest_beat: float | None  # seconds since the last beat of the rank that is behind
    behind: str
    links: tuple[dict[str, Any], ...]


def read_status(path: Path, *, now: float | None = None) -> Status:
    """The status of the run in a folder. UserError: there is no run folder."""
    folder, now = RunFolder(path), time.time() if now is None else now
    if not folder.config_file.exists():
        raise UserError(f"{path} is no run folder: it holds no config.yaml. Give the run.dir of a run")
    steps = int(read_config(folder.config_file)["run"]["steps"])
    lines = folder.read_metrics()
    done = [line for line in lines if "skipped" not in line]
    step = max((line["step"] for line in lines), default=0)
    pace = _median([_seconds(line) for line in done[-RECENT:]])
    newest, beats = folder.latest_checkpoint(), read_beats(folder.heartbeats)
    last = slowest(beats) if beats else None
    return Status(
        folder=str(path),
        state=_state(step=step, steps=steps, checkpoint=newest, beats=beats, now=now),
        step=step,
        steps=steps,
        loss=done[-1]["loss"] if done else None,
        skipped=len(lines) - len(done),
        seconds_per_step=pace,
        tokens_per_second=_median([line["tokens_per_second"] for line in done[-RECENT:]]),
        seconds_left=None if pace is None else pace * (steps - step),
        checkpoint=newest,
        checkpoint_age=None if newest is None else now - folder.checkpoint_folder(newest).stat().st_mtime,
        damaged=tuple(sorted(entry.name for entry in (path / "checkpoints").glob("damaged_*"))),
        evaluation=_evaluation(folder),
        ranks=len(beats),
        oldest_beat=None if last is None else now - last.since,
        behind="" if last is None else f"rank {last.rank} on {last.host}, step {last.step}, {last.phase}",
        links=tuple(folder.read_links()),
    )


def status_lines(status: Status) -> list[str]:
    """The status for a reader."""
    goes_on = status.state == "running" and status.seconds_left is not None
    left = f", about {duration(status.seconds_left)} left" if goes_on else ""
    lines = [f"{status.folder}: {status.state}, step {status.step:,} of {status.steps:,}{left}"]
    if status.seconds_per_step is not None:
        lines.append(
            f"speed       {status.seconds_per_step:.3g} s a step, {_number(status.tokens_per_second)} tokens/s; "
            f"loss {_number(status.loss)}"
        )
    if status.skipped:
        lines.append(f"left out    {status.skipped} steps whose loss or gradient was not finite")
    saved = (
        "none yet" if status.checkpoint is None else f"{step_name(status.checkpoint)}, {_ago(status.checkpoint_age)}"
    )
    damaged = f"; damaged: {', '.join(status.damaged)}" if status.damaged else ""
    lines.append(f"checkpoint  {saved}{damaged}")
    if status.evaluation is not None:
        lines.append(f"evaluation  {100 * status.evaluation[1]:.1f} % after step {status.evaluation[0]}")
    if status.ranks and status.state in ("running", "hung"):
        lines.append(f"heartbeats  {status.ranks} ranks; furthest behind: {status.behind}, {_ago(status.oldest_beat)}")
    lines += [f"link        {_link_text(link)}" for link in status.links[-5:]]
    return lines


def _state(*, step: int, steps: int, checkpoint: int | None, beats: Sequence[Beat], now: float) -> str:
    alive = bool(beats) and now - max(beat.written for beat in beats) < STALE_SECONDS
    if any(beat.hung for beat in beats):
        return "hung"
    if step >= steps and checkpoint == steps and not (alive and any(beat.phase != "end" for beat in beats)):
        return "finished"
    if alive and any(beat.phase != "end" for beat in beats):
        return "running"
    return "stopped" if step or checkpoint else "not begun"


def _seconds(line: dict[str, Any]) -> float:
    return sum(value for name, value in line.items() if name.startswith("time/") and value is not None)


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _evaluation(folder: RunFolder) -> tuple[int, float] | None:
    steps = folder.evaluated_steps()
    return (steps[-1], folder.read_eval(steps[-1]).metrics["avg"]) if steps else None


def _link_text(link: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in link.items())


def _ago(seconds: float | None) -> str:
    return "" if seconds is None else f"{duration(max(0.0, seconds))} ago"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.4g}"
