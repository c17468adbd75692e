"""The log of a run's console: every start appends, whatever the console itself shows."""

import io
import re

import pytest
from rich.console import Console

from megatron_paint.run.console import Progress
from megatron_paint.run.console_log import ConsoleLog
from tests.run.test_console import AFTER, BEFORE, step


@pytest.mark.parametrize("mode", ["normal", "quiet", "json"])
def test_it_has_what_the_normal_mode_prints(mode, tmp_path, capsys):
    console = Console(file=io.StringIO(), force_terminal=True, highlight=False, width=40)
    for start in (1, 2):
        progress = Progress(mode, steps=4, console=console, log=ConsoleLog())
        progress.note("before the folder [exists]")
        with progress.logging(tmp_path / "logs", ["train", "my settings.yaml"]):
            progress.step(step(start))
            progress.warn("a [warning]")
            progress.evaluation(BEFORE)
            progress.end(before=[BEFORE], after=[AFTER], folder="runs/x")
            progress.on_stderr("megatron-paint: error: [x]")
    assert capsys.readouterr().err == "megatron-paint: error: [x]\n" * 2
    text = (tmp_path / "logs" / "console.log").read_text()
    assert "\x1b" not in text
    starts = text.split("\n==== ")[1:]
    assert len(starts) == 2
    for number, start in enumerate(starts, start=1):
        head, *lines = start.splitlines()
        assert head.endswith(": megatron-paint train 'my settings.yaml'")
        lines = [re.fullmatch(r"\d\d:\d\d:\d\d  (.*)", line)[1] for line in lines if line]
        assert lines[0] == "before the folder [exists]"
        assert lines[1].startswith(f"step {number}/4  loss 0.1250 ")
        assert lines[2] == "warning: a [warning]"
        assert lines[3].startswith("evaluation at step 0 on tiny: Avg@1 50.0 % [0.0, 100.0]")
        assert any("+50.0 [+0.0, +100.0]" in line for line in lines)
        assert lines[-2:] == ["Results: runs/x", "megatron-paint: error: [x]"]


def test_a_disk_that_refuses_does_not_end_the_run(tmp_path, capsys):
    (tmp_path / "logs").write_text("a file")
    console = Console(file=io.StringIO())
    progress = Progress("normal", steps=4, console=console, log=ConsoleLog())
    with progress.logging(tmp_path / "logs", ["train"]):
        progress.note("one")
        progress.note("two")
    reason = "warning: console.log cannot be written (File exists); the run continues without it"
    assert console.file.getvalue() == f"{reason}\none\ntwo\n"
    assert capsys.readouterr().err == ""
