"""The process of one vLLM server that this run has started."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from megatron_paint.base.errors import UserError
from megatron_paint.config.secrets import without_secret_options
from megatron_paint.runtime import guard
from megatron_paint.runtime.files import disk_errors

TAIL_BYTES = 20_000
TAIL_LINES = 3


class ServerProcess:
    """A server under a guard (runtime/guard.py). It ends with this process, whatever ends that."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], log: Path, *, remove: Path | None = None
    ):
        """Starts the command. log: the file that what it prints is added to.

        remove: a folder that is removed when this process dies. UserError: the log cannot be written, or the process
        cannot be started.
        """
        self.log = log
        with disk_errors(log):
            log.parent.mkdir(parents=True, exist_ok=True)
            with open(log, "ab") as file:
                file.write(f"$ {' '.join(without_secret_options(command))}\n".encode())
                file.flush()
                self._begin = file.tell()  # an earlier server may have printed into the same file
                # The guard itself needs this process's own environment.
                inherited = os.environ | {guard.ENVIRONMENT: json.dumps(dict(environment))}
                try:
                    self._process = subprocess.Popen(
                        [sys.executable, "-m", guard.__name__, str(os.getpid()), str(remove or ""), *command],
                        env=inherited,
                        stdin=subprocess.PIPE,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                except OSError as error:
                    raise UserError(f"a vLLM server could not be started: {error}") from error

    @property
    def runs(self) -> bool:
        """Whether it still runs. vLLM's own exit status says nothing: it is 0 after a fault."""
        return self._process.poll() is None

    def kill(self) -> None:
        """Kills all processes of the server, also suspended ones, and waits for their end."""
        with suppress(BrokenPipeError):
            self._process.stdin.close()  # the guard kills the server's group, and removes its shared memory
        self._process.wait()

    def last_words(self) -> str:
        """The last lines that name an error, or the last lines, of what the server printed."""
        with suppress(OSError), open(self.log, "rb") as file:
            file.seek(max(self._begin, self.log.stat().st_size - TAIL_BYTES))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
            errors = [line for line in lines if "Error" in line]
            return " | ".join(line[-300:] for line in (errors or lines)[-TAIL_LINES:])
        return ""


def free_port(address: str = "127.0.0.1", *, besides: Collection[int] = ()) -> int:
    """A port that is free now at an address of this machine. besides: ports that a server will take."""
    while True:
        with socket.socket() as found:
            found.bind((address, 0))
            port = found.getsockname()[1]
        if port not in besides:
            return port
