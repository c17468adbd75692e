"""The start of several servers, of which one ends."""

import sys
import time

import pytest

from megatron_paint.base.errors import UserError
from megatron_paint.config.vllm import VllmSettings
from megatron_paint.rollouts.vllm.command import ServerOptions
from megatron_paint.rollouts.vllm.fleet import Fleet

# The other server loads its model for a long time.
PROGRAM = "import os, time; time.sleep(600) if os.environ['CUDA_VISIBLE_DEVICES'] == 'slow' else exit('no GPU')"


def test_the_first_server_that_ends_is_named_at_once(tmp_path):
    """The others are not waited for, and `close` ends them."""
    settings = VllmSettings(servers=3, devices=("slow", "none", "slow"), command=(sys.executable, "-c", PROGRAM))
    engine = ServerOptions(settings=settings, dtype="float32", logprobs_mode="raw_logprobs")
    fleet = Fleet(engine, vocab_size=10, logs=tmp_path, note=print)
    fleet.start(tmp_path)
    start = time.monotonic()
    with pytest.raises(UserError, match=r"^vLLM server 1 .* does not start: starting: .* no GPU\. .*server_1\.log$"):
        fleet.wait_until_ready()
    assert time.monotonic() - start < 60
    assert len(fleet.live) == 2
    fleet.close()
    assert not any(server.process.runs for server in fleet.live)
