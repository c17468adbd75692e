"""`report --serve`: what it answers, to whom, and that it follows a run."""

import base64
import http.client
import json
import re
import signal
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import pytest

from megatron_paint.base.errors import UserError
from megatron_paint.report.live import make_server
from megatron_paint.run.folder import RunFolder
from tests.report.made_run import make_run, metrics, read_block, sample

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run", steps=2)


@pytest.fixture
def server(run):
    made = make_server([run])
    thread = threading.Thread(target=made.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join()


def ask(server, path, *, method="GET", **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    return answer, answer.read()


def test_the_page_is_live(server):
    answer, body = ask(server, "/")
    data = read_block(body.decode(), "report-data")
    assert (answer.status, data["live"], data["samples"]["step"]) == (200, True, [1] * 4 + [2] * 4)
    assert read_block(body.decode(), "report-pages") == {}
    assert "connect-src &#39;self&#39;" in body.decode()
    assert answer.headers["Content-Security-Policy"] == "frame-ancestors 'none'"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


def test_new_steps_appear(server, run):
    answer, body = ask(server, "/data")
    stamp = answer.headers["ETag"]
    assert json.loads(body)["runs"][0]["steps"] == [1, 2]
    answer, body = ask(server, "/data", If_None_Match=stamp)
    assert (answer.status, body) == (304, b"")
    folder = RunFolder(run)
    folder.append_metrics(metrics(3))
    folder.write_samples(3, [sample(3, 0)])
    answer, body = ask(server, "/data", If_None_Match=stamp)
    assert answer.status == 200
    assert json.loads(body)["runs"][0]["steps"] == [1, 2, 3]
    answer, body = ask(server, "/pages/r0_3_0")
    assert json.loads(zlib.decompress(base64.b64decode(body)))["entries"][0]["text"] == "40+8=50\n\\boxed{50}<|im_end|>"


def test_answers_of_evaluations_are_served(server):
    data = json.loads(ask(server, "/data")[1])
    assert data["answers"]["page"] == ["e0_0", "e0_0", "e3_0", "e3_0"]
    _, body = ask(server, "/pages/r0_e3_0")
    entry = json.loads(zlib.decompress(base64.b64decode(body)))["entries"][0]
    assert (entry["reference"], entry["answers"][0]["outcome"]) == ("40", "right")


@pytest.mark.parametrize(
    "path",
    [
        *(
            "/pages/r0_9_0",
            "/pages/r1_1_0",
            "/pages/r0_1_7",
            "/pages/r0_e9_0",
            "/pages/r0_e3_1",
            "/pages/../config.yaml",
            "/config.yaml",
            "/pages/",
        ),
        *("/../", "/pages/r0_1_0.js", "/pages/%2e%2e/config.yaml", "//etc/passwd"),
    ],
)
def test_nothing_else_is_served(server, path):
    answer, body = ask(server, path)
    assert (answer.status, body) == (404, b"There is no such page.\n")


@pytest.mark.parametrize("host", ["example.org", "127.0.0.1", "127.0.0.1:1", "localhost", "", "evil.localhost:{port}"])
def test_other_hosts_are_refused(server, host):
    """A site that gives its own name the address of this machine gets nothing."""
    answer, body = ask(server, "/data", Host=host.format(port=server.server_port))
    assert (answer.status, body) == (421, b"This server answers only requests for localhost.\n")
    assert ask(server, "/", Host=f"localhost:{server.server_port}")[0].status == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_only_get_is_answered(server, method):
    assert ask(server, "/data", method=method)[0].status == 501


def test_it_listens_on_this_machine_alone(server):
    assert server.server_address[0] == "127.0.0.1"


def test_the_command_ends_with_ctrl_c(run):
    command = [sys.executable, "-m", "megatron_paint", "report", str(run), "--serve"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}

    def heed_ctrl_c() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background job ignores it

    with subprocess.Popen(command, cwd=ROOT, preexec_fn=heed_ctrl_c, **pipes) as process:
        try:
            line = process.stdout.readline()
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert re.fullmatch(rf"http://127\.0\.0\.1:\d+/ follows {run}; Ctrl-C ends it\n", line)
    assert (process.returncode, out, err) == (0, "", "")


def test_refusals(run, server, tmp_path):
    with pytest.raises(UserError, match="cannot be used"):
        make_server([run], port=server.server_port)
    with pytest.raises(UserError, match="cannot be used"):
        make_server([run], port=99999)
    with pytest.raises(UserError, match="is no folder"):
        make_server([tmp_path / "nothing"])
