"""What a run does now: a line at the bottom of a terminal, or lines about long work where there is no terminal."""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from megatron_paint.runtime.heartbeat import phase_now
from megatron_paint.runtime.work import Work, work_now

A_SECOND = 4  # how often the line is drawn
BAR_WIDTH = 24
PLAIN_SECONDS = 30.0  # between two lines about the same work


@contextmanager
def live_line(console: Console, *, steps: int) -> Iterator[None]:
    """Draws the line while the block runs, from a thread of rich. What is printed meanwhile appears above it.

    console: of a terminal. steps: of the run; 0: it has no steps.
    """
    shown = Live(
        console=console,
        get_renderable=lambda: line_now(steps=steps),
        refresh_per_second=A_SECOND,
        transient=True,
        redirect_stderr=sys.stderr.isatty(),  # else errors would not reach the file that a user gave
    )
    with shown:
        console.show_cursor(True)  # a process that is killed could not show it again
        yield


def line_now(*, steps: int) -> RenderableType:
    """What this process does now: step and phase of its heartbeat, and its work with rate and time left."""
    now, known = work_now(), phase_now()
    parts = []
    if known is not None:
        phase, step, seconds = known
        if step and steps:
            parts.append(f"step {step}/{steps}")
        parts.append(phase)
        if now is None:
            parts.append(f"for {duration(seconds)}")
    if now is None:
        return Text("  ".join(parts), style="dim")
    table = Table.grid(padding=(0, 2))
    cells = [*(Text(part, style="dim") for part in parts), Text(now.name)]
    if now.total:
        cells.append(ProgressBar(total=now.total, completed=min(now.done, now.total), width=BAR_WIDTH))
    table.add_row(*cells, Text(work_text(now)))
    return table


def work_text(now: Work) -> str:
    """Done, total, rate and time left."""
    most = "at most " if now.at_most else ""
    text = f"{now.done:,}/{most}{now.total:,} {now.unit}" if now.total else f"{now.done:,} {now.unit}"
    if now.rate:
        text += f"  {now.rate:,.3g} a second" if now.rate < 10 else f"  {now.rate:,.0f} a second"
    left = now.seconds_left
    return text if left is None else f"{text}  {most}{duration(left)} left"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds as h:mm:ss."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


@contextmanager
def plain_lines(say: Callable[[str], None], *, every: float = PLAIN_SECONDS) -> Iterator[None]:
    """Says a line about the work of this process, if it has any, every so many seconds while the block runs."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(every):
            if (now := work_now()) is not None:
                say(f"{now.name}: {work_text(now)}")

    thread = threading.Thread(target=watch, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
