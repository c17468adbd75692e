"""The log of a server: what it was started with, without secrets."""

import os
import sys

from megatron_paint.rollouts.vllm.process import ServerProcess


def test_the_command_is_written_without_its_keys(tmp_path):
    log = tmp_path / "server.log"
    server = ServerProcess([sys.executable, "-c", "pass", "--api-key", "sk-1"], os.environ, log)
    server.kill()
    first = log.read_text().splitlines()[0]
    assert first == f"$ {sys.executable} -c pass --api-key (hidden)"
