"""The log of a server: what it was started with, without secrets, and its last words."""

import os
import sys
import time

import pytest

from megatron_paint.base.errors import UserError
from megatron_paint.rollouts.vllm.process import ServerProcess, free_port


def test_the_command_is_written_without_its_keys(tmp_path):
    log = tmp_path / "server.log"
    server = ServerProcess([sys.executable, "-c", "pass", "--api-key", "sk-1"], os.environ, log)
    server.kill()
    first = log.read_text().splitlines()[0]
    assert first == f"$ {sys.executable} -c pass --api-key (hidden)"


def test_the_last_words_are_those_of_this_start(tmp_path):
    log = tmp_path / "server.log"
    log.write_text("RuntimeError: the fault of yesterday\n")
    server = ServerProcess([sys.executable, "-c", "print('loading'); print('no GPU')"], os.environ, log)
    while server.runs:
        time.sleep(0.05)
    assert server.last_words() == "loading | no GPU"
    server.kill()


def test_a_server_that_cannot_be_started(tmp_path):
    too_much = {"NAMES": "x" * 200_000}  # a process takes 128 kB in one variable
    with pytest.raises(UserError, match=r"^a vLLM server could not be started: .*Argument list too long"):
        ServerProcess([sys.executable, "-c", "pass"], too_much, tmp_path / "server.log")


def test_a_port_that_another_server_will_take_is_not_given_twice(monkeypatch):
    bound = iter([7001, 7001, 7002])

    class Socket:
        """Binds to the next of the ports."""

        def __enter__(self):
            return self

        def __exit__(self, *_):
            """Closes nothing."""

        def bind(self, _):
            self.port = next(bound)

        def getsockname(self):
            return "127.0.0.1", self.port

    monkeypatch.setattr("megatron_paint.rollouts.vllm.process.socket.socket", Socket)
    assert free_port() == 7001
    assert free_port(besides={7001}) == 7002
