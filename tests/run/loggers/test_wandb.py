"""The real library, offline, and its failures at the start."""

import json
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megatron_paint.run.loggers.loggers import Loggers
from megatron_paint.run.loggers.wandb import WandbLogger, end_service
from tests.run.loggers.stand_ins import evaluation, info, report

wandb = pytest.importorskip("wandb")
BLOCK, HEAD = 32768, 7
COMPLETE, LAST = 1, 4  # kinds of a part


@pytest.fixture
def offline(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_API_KEY", "WANDB_PROJECT", "WANDB_NAME", "WANDB_ENTITY"):
        monkeypatch.delenv(name, raising=False)
    wandb.teardown()  # it reads the environment once
    yield tmp_path
    limit = threading.Timer(20.0, end_service)
    limit.start()
    wandb.teardown()  # waits for its process without a limit
    limit.cancel()


def records(folder):
    """The records of all offline runs in a run folder, in their order."""
    from wandb.proto import wandb_internal_pb2

    files = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"), key=lambda file: file.stat().st_mtime_ns)
    return [wandb_internal_pb2.Record.FromString(data) for file in files for data in chunks(file.read_bytes())]


def chunks(content):
    """The records of a log in LevelDB's format, after wandb's 7 bytes: blocks of 32 KiB with parts of records."""
    assert content[:4] == b":W&B"
    at, parts = 7, []
    while at < len(content):
        left = BLOCK - at % BLOCK
        if left < HEAD:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        parts.append(content[at + HEAD : at + HEAD + length])
        at += HEAD + length
        if kind in (COMPLETE, LAST):
            yield b"".join(parts)
            parts = []


def train(folder, steps, *, start=0):
    lines = []
    opened = Loggers(
        [WandbLogger(info(folder, resume_step=start))], samples_every=2, note=lines.append, warn=lines.append
    )
    opened.open()
    for step in steps:
        opened.step(*report(step))
    opened.evaluation(evaluation(steps[-1]))
    opened.close("finished")
    return lines


def test_a_run_offline_that_resumes_as_the_same_run(offline):
    (line,) = train(offline, (1, 2))
    assert line == f"wandb: logging to {offline / 'wandb'}; `wandb sync` sends it"
    time.sleep(1.1)  # wandb names a folder after the second and the id
    assert train(offline, (2, 3), start=1) == [line]
    wandb.teardown()  # its service ends, so the files are complete
    found = records(offline)
    runs = [record.run for record in found if record.WhichOneof("record_type") == "run"]
    stored = json.loads((offline / "loggers.json").read_text())["wandb"]
    assert {run.run_id for run in runs} == {stored["id"]}
    assert {(run.display_name, run.project) for run in runs} == {("first", "tests")}
    rows = []
    for record in found:
        if record.WhichOneof("record_type") == "history":
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            rows.append(row)
    assert [row["step"] for row in rows if row.get("loss") == 0.5] == [1, 2, 2, 3]
    assert [row["step"] for row in rows if "eval/tiny/avg" in row] == [2, 3]
    tables = [row for row in rows if "samples/_type" in row]
    assert [row["step"] for row in tables] == [1, 2, 2]
    assert (tables[0]["samples/_type"], tables[0]["samples/nrows"]) == ("table-file", 1)
    settings = [
        (item.key or "/".join(item.nested_key), item.value_json)
        for record in found
        if record.WhichOneof("record_type") == "config"
        for item in record.config.update
    ]
    assert any(key == "optimizer" and json.loads(value)["lr"] == 5.0e-6 for key, value in settings)


def test_the_command_line_is_not_sent(offline, monkeypatch):
    monkeypatch.setattr("sys.argv", ["megatron-paint", "rollout.vllm.environment.HF_TOKEN=hf_secret"])
    train(offline, (1,))
    files = [file for file in (offline / "wandb").rglob("*") if file.is_file()]
    assert files
    assert not [file for file in files if b"hf_secret" in file.read_bytes()]


def test_no_login_is_one_line(offline, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    (line,) = train(offline, (1,))
    assert line == (
        "wandb: no API key is known: run `wandb login` or set WANDB_API_KEY, or set WANDB_MODE=offline. The run "
        "continues without it"
    )


def test_a_server_that_is_not_there_is_one_line(offline, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("megatron_paint.run.loggers.wandb.INIT_SECONDS", 3.0)
    (line,) = train(offline, (1,))
    assert line.startswith("wandb: ")
    assert line.endswith(
        "The run continues without it; WANDB_MODE=offline keeps the data in run.dir, and `wandb sync` sends it later"
    )
    assert "0" * 40 not in line


def test_the_id_is_stored_before_the_run_exists_there(offline, monkeypatch):
    found = []

    def init(**arguments):
        found.append((arguments["id"], json.loads((offline / "loggers.json").read_text())["wandb"]))
        raise RuntimeError("killed here")

    monkeypatch.setattr(wandb, "init", init)
    train(offline, (1,))
    train(offline, (1,))
    (first, stored), (second, _) = found
    assert stored == {"id": first}
    assert second == first


def test_a_stuck_service_does_not_keep_the_process(offline):
    """W&B's own process is suspended. W&B would wait for it for ever when the run's process ends."""
    with open(offline / "out", "w+") as out:
        started = time.monotonic()
        ended = subprocess.run(
            [sys.executable, "-m", "tests.run.loggers.stuck_service", offline],
            cwd=Path(__file__).parents[3],
            stdout=out,  # no pipe: the suspended process would hold it
            stderr=subprocess.STDOUT,
            timeout=120,
        )
        out.seek(0)
        text = out.read()
    assert ended.returncode == 0, text
    assert "wandb: TimeoutError: not everything was sent within 3 seconds. The run continues" in text
    assert time.monotonic() - started < 60
