"""The start of several servers, of which one ends."""

import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from megatron_paint.base.errors import UserError
from megatron_paint.config.vllm import VllmSettings
from megatron_paint.rollouts.vllm.command import ServerOptions
from megatron_paint.rollouts.vllm.fleet import Fleet

# The other server loads its model for a long time.
PROGRAM = "import os, time; time.sleep(600) if os.environ['CUDA_VISIBLE_DEVICES'] == 'slow' else exit('no GPU')"


class Answers(BaseHTTPRequestHandler):
    """A server that another run updates, or that does not count its tokens."""

    paused = True

    def do_GET(self):
        content = json.dumps({"is_paused": self.paused, "data": [{"id": "model", "max_model_len": 100}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments):
        """Prints nothing."""


@pytest.mark.parametrize(
    ("paused", "message"),
    [
        (True, r"^vLLM server 0 .* is paused: another run updates it.*start it again$"),
        (False, r"^vLLM server 0 .* does not count its tokens, .*: start it without --disable-log-stats$"),
    ],
)
def test_a_server_that_the_run_cannot_use_is_refused(paused, message, tmp_path):
    server = HTTPServer(("127.0.0.1", 0), type("Handler", (Answers,), {"paused": paused}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    settings = VllmSettings(urls=(f"http://127.0.0.1:{server.server_port}",))
    engine = ServerOptions(settings=settings, dtype="float32", logprobs_mode="raw_logprobs")
    fleet = Fleet(engine, vocab_size=10, logs=tmp_path, note=print)
    fleet.start(tmp_path)
    try:
        with pytest.raises(UserError, match=message):
            fleet.wait_until_ready()
    finally:
        fleet.close()
        server.shutdown()


def test_the_first_server_that_ends_is_named_at_once(tmp_path):
    """The others are not waited for, and `close` ends them."""
    settings = VllmSettings(servers=3, devices=("slow", "none", "slow"), command=(sys.executable, "-c", PROGRAM))
    engine = ServerOptions(settings=settings, dtype="float32", logprobs_mode="raw_logprobs")
    fleet = Fleet(engine, vocab_size=10, logs=tmp_path, note=print)
    fleet.start(tmp_path)
    start = time.monotonic()
    with pytest.raises(UserError, match=r"^vLLM server 1 .* does not start: starting: no GPU\. .*server_1\.log$"):
        fleet.wait_until_ready()
    assert time.monotonic() - start < 60
    assert len(fleet.live) == 2
    fleet.close()
    assert not any(server.process.runs for server in fleet.live)
