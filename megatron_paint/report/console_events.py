"""Reads logs/console.log of a run: its starts, its warnings in order, and the facts that a start prints."""

import calendar
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

START = re.compile(r"==== (?P<when>.+?), (?P<host>[^,:]+): (?P<command>.*)")
LINE = re.compile(r"(?P<time>\d\d:\d\d:\d\d)  (?P<text>.*)")
STEP = re.compile(r"step +(?P<step>\d+)/\d+ ")
FACT = re.compile(r"(?P<name>[a-z][a-z-]+) {2,}(?P<text>\S.*)")
WARNING = "warning: "
ENDINGS = ("Stopped ", "megatron-paint: ", "skipped ")
FACTS = ("model", "layout", "layers", "loss", "step", "memory", "host", "data")  # lines of a start, by their first word


@dataclass(frozen=True, kw_only=True)
class Event:
    """A warning, or the end of a start that did not end as planned."""

    kind: str  # warning or end
    start: int  # number of the start, from 1; 0: before the first one
    time: str  # of the day
    after_step: int  # the last step that was printed before it; 0: none
    text: str


@dataclass(frozen=True, kw_only=True)
class Start:
    """One start of a run."""

    when: str
    host: str
    command: str
    after_step: int  # the last step that earlier starts had printed


@dataclass(frozen=True, kw_only=True)
class Console:
    """The starts, events and facts of a console.log."""

    starts: list[Start] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)  # of the last start


def start_at_step(starts: Sequence[Start], step: int) -> int:
    """The number of the start that made a step: the last one with earlier steps before it; 0: there is no start."""
    found = [number for number, start in enumerate(starts, 1) if start.after_step < step]
    return found[-1] if found else min(1, len(starts))


def start_at_time(starts: Sequence[Start], moment: str) -> int:
    """The number of the last start that is not later than an ISO time; without a time zone it is UTC.

    The last start if the time or the time zone of a start is not known; 0: there is no start.
    """
    begun = [_seconds(start.when) for start in starts]
    try:
        at = datetime.fromisoformat(moment)
        at = (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return len(starts)
    if None in begun:
        return len(starts)
    found = [number for number, seconds in enumerate(begun, 1) if seconds <= at]
    return found[-1] if found else min(1, len(starts))


def _seconds(when: str) -> float | None:
    """The time of a start in seconds since 1970; None: its time zone is neither UTC nor that of this machine."""
    try:
        if when.endswith((" UTC", " GMT")):
            return calendar.timegm(time.strptime(when[:-4], "%Y-%m-%d %H:%M:%S"))
        return time.mktime(time.strptime(when, "%Y-%m-%d %H:%M:%S %Z"))
    except (ValueError, OverflowError):
        return None


def read_console(text: str) -> Console:
    """Reads the text of a console.log. Lines of other forms are ignored."""
    console, step, last_fact = Console(), 0, ""
    for line in text.split("\n"):
        if begun := START.match(line):
            console.starts.append(Start(**begun.groupdict(), after_step=step))
            last_fact = ""
            continue
        if (found := LINE.match(line)) is None:
            continue
        said = found["text"]
        if done := STEP.match(said):
            step = int(done["step"])
        kind = "warning" if said.startswith(WARNING) else "end" if said.startswith(ENDINGS) else ""
        if kind:
            console.events.append(
                Event(
                    kind=kind,
                    start=len(console.starts),
                    time=found["time"],
                    after_step=step,
                    text=said.removeprefix(WARNING),
                )
            )
        elif (fact := FACT.match(said)) and fact["name"] in FACTS and not done:
            console.facts[last_fact := fact["name"]] = fact["text"]
        elif said.startswith("      ") and last_fact:  # a fact of several lines
            console.facts[last_fact] += f"; {said.strip()}"
        else:
            last_fact = ""
    return console
