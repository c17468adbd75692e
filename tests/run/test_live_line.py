"""The line that shows what a run does now, and its absence where nobody looks."""

import io
import re
import sys
import time

import pytest
from rich.console import Console

from megatron_paint.run.console import Progress
from megatron_paint.run.live_line import line_now, live_line, plain_lines, work_text
from megatron_paint.runtime import heartbeat
from megatron_paint.runtime.heartbeat import Watchdog, phase_now
from megatron_paint.runtime.work import Work, work


def finished(done, seconds, **known):
    times = iter([0.0] + [seconds] * 9)
    found = Work("sampling", clock=lambda: next(times), **known)
    found.advance(done)
    return found


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (finished(2000, 10.0, total=10000, unit="tokens"), "2,000/10,000 tokens  200 a second  0:00:40 left"),
        (
            finished(2000, 10.0, total=10000, unit="tokens", at_most=True),
            "2,000/at most 10,000 tokens  200 a second  at most 0:00:40 left",
        ),
        (finished(3, 2.0, total=9, unit="micro-batches"), "3/9 micro-batches  1.5 a second  0:00:04 left"),
        (finished(3, 2.0, total=0, unit="rows"), "3 rows  1.5 a second"),
        (finished(0, 2.0, total=9, unit="rows"), "0/9 rows"),
    ],
)
def test_done_rate_and_time_left(found, text):
    assert work_text(found) == text


@pytest.fixture
def beating(tmp_path, monkeypatch):
    watchdog = Watchdog(tmp_path, rank=0, ranks=1, limit=None, give_up=print)
    monkeypatch.setattr(heartbeat, "_watchdog", watchdog)
    watchdog.mark_progress("student", 3)


def printed(*, steps):
    console = Console(file=io.StringIO(), width=160)
    console.print(line_now(steps=steps))
    return " ".join(console.file.getvalue().split())


def test_step_phase_and_work(beating):
    assert phase_now()[:2] == ("student", 3)
    assert printed(steps=10) == "step 3/10 student for 0:00:00"
    with work("forward and backward", total=8, unit="micro-batches") as begun:
        begun.advance(2)
        shown = re.sub("[━╸╺ ]+", " ", printed(steps=10))
    assert shown.startswith("step 3/10 student forward and backward 2/8 micro-batches")


def test_without_a_heartbeat_there_is_only_the_work():
    assert printed(steps=0) == ""
    with work("checking problems", total=8, unit="rows"):
        assert re.sub("[━╸╺ ]+", " ", printed(steps=0)) == "checking problems 0/8 rows"


def drawn(mode, *, terminal, plain=False, environment=None):
    console = Console(
        file=io.StringIO(),
        force_terminal=terminal,
        width=100,
        highlight=False,
        _environ=environment or {"TERM": "xterm"},
    )
    progress = Progress(mode, steps=4, console=console)
    with progress.live(plain=plain), work("sampling", total=8, unit="tokens") as begun:
        begun.advance(2)
        progress.note("a note")
        time.sleep(0.6)
    return console.file.getvalue()


def test_a_terminal_has_a_line_below_what_is_printed():
    text = drawn("normal", terminal=True)
    assert "a note" in text
    assert "2/8 tokens" in text
    assert text.rindex("2/8 tokens") > text.index("a note")
    assert "\x1b[?25h" in text  # the cursor stays visible


@pytest.mark.parametrize(
    ("mode", "terminal", "expected"),
    [("normal", False, "a note\n"), ("quiet", True, ""), ("silent", True, "")],
)
def test_nobody_else_has_it(mode, terminal, expected):
    assert drawn(mode, terminal=terminal) == expected


def test_json_has_only_events():
    assert drawn("json", terminal=True) == '{"event": "note", "message": "a note"}\n'


def test_no_color():
    text = drawn("normal", terminal=True, environment={"TERM": "xterm", "NO_COLOR": "1"})
    assert "2/8 tokens" in text
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", text)


def test_a_log_has_plain_lines_about_long_work():
    said = []
    with plain_lines(said.append, every=0.02):
        time.sleep(0.1)  # without work, nothing
        assert said == []
        with work("checking answers", total=10, unit="answers") as begun:
            begun.advance(5)
            while not said:
                time.sleep(0.01)
    assert said[0].startswith("checking answers: 5/10 answers  ")


def test_the_console_prints_every_nth_step_and_the_log_all(tmp_path):
    from megatron_paint.run.console_log import ConsoleLog
    from tests.run.test_console import step

    console = Console(file=io.StringIO(), highlight=False)
    progress = Progress("normal", steps=7, console=console, log=ConsoleLog(), log_every=3)
    with progress.logging(tmp_path, ["train"]):
        for number in range(1, 8):
            progress.step(step(number))
    shown = re.findall(r"^step (\d)/7", console.file.getvalue(), re.MULTILINE)
    assert shown == ["1", "3", "6", "7"]
    assert re.findall(r"  step (\d)/7", (tmp_path / "console.log").read_text()) == list("1234567")


def test_errors_stay_on_stderr_where_that_is_a_file(monkeypatch):
    terminal, errors = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", errors)
    with live_line(Console(file=terminal, force_terminal=True, width=80), steps=3):
        print("a mistake", file=sys.stderr)
    assert errors.getvalue() == "a mistake\n"
    assert "a mistake" not in terminal.getvalue()
