"""A command of the package in a fork of the test's process, which has imported torch already.

The tests' process must not have used CUDA, and its children use one thread each.
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from typing import IO


class ForkedCommand:
    """A function that runs in a child process; what the child prints is kept.

    function: its result is the exit status. The child leads its own session and handles SIGINT as a command started by
    a user does. environment: the child's variables.
    """

    def __init__(self, function: Callable[[], int | None], *, environment: Mapping[str, str] | None = None) -> None:
        pipes = [os.pipe() for _ in range(2)]
        fork = multiprocessing.get_context("fork")
        self._process: BaseProcess = fork.Process(target=_child, args=(function, environment, pipes))
        self._process.start()
        self._texts = ["", ""]
        self._readers = []
        for index, (read_end, write_end) in enumerate(pipes):
            os.close(write_end)
            reader = threading.Thread(target=self._read, args=(index, os.fdopen(read_end)), daemon=True)
            reader.start()
            self._readers.append(reader)

    @property
    def pid(self) -> int:
        return self._process.pid

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while the command runs."""
        return self._process.exitcode

    def end(self, *, timeout: float = 600.0) -> tuple[int, str, str]:
        """(exit status, stdout, stderr) of a command that is about to end, with all its children."""
        self._process.join(timeout)
        assert self.poll() is not None, f"still running after {timeout:g} s"
        for reader in self._readers:
            reader.join(timeout)
            assert not reader.is_alive(), "a child of the command still runs"
        return self.poll(), *self._texts

    def _read(self, index: int, stream: IO[str]) -> None:
        with stream:
            self._texts[index] = stream.read()


def _child(function: Callable[[], int | None], environment: Mapping[str, str] | None, pipes: list) -> None:
    import torch

    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, (read_end, write_end) in enumerate(pipes, start=1):
        os.dup2(write_end, number)
        os.close(read_end)
        os.close(write_end)
    # What the tests' process holds in its own streams, and pytest's capture of them, stays there.
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    if environment is not None:
        os.environ.clear()
        os.environ.update(environment)
    torch.set_num_threads(1)
    sys.exit(function())
