"""Reads logs/console.log of a run: its starts, its warnings in order, and the facts that a start prints."""

import re
from dataclasses import dataclass, field

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
