"""RUN/logs/console.log: what every start of a run has printed, one after another."""

import io
import shlex
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from rich.console import Console, RenderableType

WIDTH = 120  # of tables
CONSOLE_LOG = "console.log"


class ConsoleLog:
    """Lines of the console, each with the time. Until `open` it keeps them: the run folder need not exist before.

    A disk that refuses ends the log, with one warning, and not the run.
    """

    def __init__(self) -> None:
        self.on_failure: Callable[[str], None] = print  # gets the warning
        self._kept: list[str] = []
        self._stream: TextIO | None = None
        self._is_broken = False

    def open(self, logs: Path, *, command: Sequence[str] | None = None) -> None:
        """Appends to the file in the folder `logs` of a run. command: of a new start, which gets a separate line."""
        head = [] if command is None else [_head(command)]
        try:
            logs.mkdir(parents=True, exist_ok=True)
            self._stream = open(logs / CONSOLE_LOG, "a", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
        except OSError as error:
            self._give_up(error)
        kept, self._kept = self._kept, []
        self._write([*head, *kept])

    def add(self, printed: RenderableType) -> None:
        """Adds what is printed: a text with rich's markup, or a table."""
        text = io.StringIO()
        console = Console(file=text, width=WIDTH, color_system=None, force_terminal=False, highlight=False, emoji=False)
        console.print(printed, soft_wrap=isinstance(printed, str))
        self._write([f"{time.strftime('%H:%M:%S')}  {line}" for line in text.getvalue().splitlines()])

    def close(self) -> None:
        """Closes the file."""
        if self._stream is not None:
            self._stream.close()
        self._stream, self._is_broken = None, True

    def _write(self, lines: list[str]) -> None:
        if self._is_broken:
            return
        if self._stream is None:
            self._kept += lines
            return
        try:
            self._stream.writelines(f"{line}\n" for line in lines)
            self._stream.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self._is_broken, self._stream = True, None
        self.on_failure(f"{CONSOLE_LOG} cannot be written ({error.strerror}); the run continues without it")


def _head(command: Sequence[str]) -> str:
    return f"\n==== {time.strftime('%Y-%m-%d %H:%M:%S %Z')}, {socket.gethostname()}: {shlex.join(command)}"
