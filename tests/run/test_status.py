"""The status of a run in a folder made by hand; who is behind; which checkpoints are removed; when a job ends."""

import json
import signal
import time
from dataclasses import asdict

import pytest

from megatron_paint.base.errors import UserError
from megatron_paint.config.schedule import expired_checkpoints
from megatron_paint.config.settings import RunSettings
from megatron_paint.run.folder import RunFolder
from megatron_paint.run.status import read_status, status_lines
from megatron_paint.runtime.heartbeat import Heartbeat, hang_message, slowest
from megatron_paint.runtime.stop import StopRequest, exit_status, job_end
from tests.run.loggers.stand_ins import evaluation

NOW = 1_000_000.0


def heartbeat(rank, step, *, since=NOW - 5, phase="student", written=NOW - 5, **more):
    return Heartbeat(rank=rank, host=f"n{rank}", pid=7, step=step, phase=phase, since=since, written=written, **more)


def run_folder(path, *, steps=10, done=(), heartbeats=(), checkpoints=()):
    path.mkdir()
    (path / "config.yaml").write_text(f"run: {{steps: {steps}}}\n")
    lines = [
        {"step": step, "loss": 1 / step, "tokens_per_second": 10.0 * step, "time/rollout_s": 1.0, "time/student_s": 0.5}
        for step in done
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    heartbeat_folder = path / "logs" / "heartbeats"
    heartbeat_folder.mkdir(parents=True)
    for one in heartbeats:
        content = {name: getattr(one, name) for name in Heartbeat.__dataclass_fields__}
        (heartbeat_folder / f"rank_{one.rank:05d}.json").write_text(json.dumps(content))
    for step in checkpoints:
        folder = path / "checkpoints" / f"step_{step:06d}"
        folder.mkdir(parents=True)
        (folder / "complete").touch()
    return path


def test_a_running_run(tmp_path):
    heartbeats = [heartbeat(0, 5), heartbeat(1, 4, since=NOW - 30), heartbeat(2, 5, since=NOW - 90)]
    run = run_folder(tmp_path / "run", done=range(1, 5), heartbeats=heartbeats, checkpoints=[2, 4])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "skipped": "loss is not finite"}\n{"step": 6, "lo')
    status = read_status(run, now=NOW)
    assert (status.state, status.step, status.steps, status.skipped, status.checkpoint) == ("running", 5, 10, 1, 4)
    assert (status.seconds_per_step, status.tokens_per_second, status.seconds_left) == (1.5, 25.0, 7.5)
    assert (status.behind, status.oldest_progress) == ("rank 1 on n1, step 4, student", 30.0)
    text = "\n".join(status_lines(status))
    assert "running, step 5 of 10, about 0:00:08 left" in text
    assert "skipped     1 step, which" in text
    assert "3 ranks; furthest behind: rank 1 on n1, step 4, student, 0:00:30 ago" in text


@pytest.mark.parametrize(
    ("state", "made"),
    [
        ("not begun", {}),
        ("stopped", {"done": [1], "heartbeats": [heartbeat(0, 1, phase="end")]}),
        ("stopped", {"done": [1], "heartbeats": [heartbeat(0, 1, written=NOW - 500)]}),
        ("hung", {"done": [1], "heartbeats": [heartbeat(0, 1, hung=True), heartbeat(1, 1)]}),
        ("finished", {"done": range(1, 11), "checkpoints": [10], "heartbeats": [heartbeat(0, 10, phase="end")]}),
        ("running", {"done": range(1, 11), "checkpoints": [10], "heartbeats": [heartbeat(0, 10, phase="evaluation")]}),
        ("running", {"heartbeats": [heartbeat(0, 0, phase="start")]}),
    ],
)
def test_states(tmp_path, state, made):
    assert read_status(run_folder(tmp_path / "run", **made), now=NOW).state == state


def test_no_run_folder(tmp_path):
    with pytest.raises(UserError, match=r"is not a run folder: it has no config.yaml"):
        read_status(tmp_path)


def test_what_is_damaged_is_a_line_and_the_rest_is_shown(tmp_path):
    run = run_folder(tmp_path / "run", done=range(1, 4))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "time/rollout_s": "a"}\n{"step": 5, "loss": null, "tokens_per_second": null}\n')
        file.write('{"step": "six", "loss": 1}\n{"step": 1e999}\n{"step": 7, "loss": "x", "tokens_per_second": 1.0}\n')
    (run / "eval").mkdir()
    RunFolder(run).write_eval(evaluation(0))
    (run / "eval" / "step_000002.json").write_text('{"answers')
    (run / "eval" / "step_000003.json").write_text(json.dumps({**asdict(evaluation(3)), "metrics": {}}))
    status = read_status(run, now=NOW)
    assert (status.step, status.loss, status.tokens_per_second, status.evaluation) == (7, None, 15.0, (0, 1.0))
    assert [line for line in status_lines(status) if line.startswith("damaged")] == [
        "damaged     metrics.jsonl: 2 of 6 steps have no loss or no tokens_per_second",
        "damaged     eval/step_000003.json has no evaluation that can be read",
        "damaged     eval/step_000002.json has no evaluation that can be read",
    ]


@pytest.mark.parametrize("config", ["model: {}", "run: 5", "run: {steps: x}", "run: {}"])
def test_a_config_without_a_number_of_steps_is_named(tmp_path, config):
    run = run_folder(tmp_path / "run")
    (run / "config.yaml").write_text(config + "\n")
    with pytest.raises(UserError, match=r"/config\.yaml is damaged: its run\.steps is ('x'|None) and not an integer"):
        read_status(run)


def test_who_is_behind():
    """The earliest step counts first, then who waits for nobody, then the oldest progress."""
    heartbeats = [
        heartbeat(0, 7, since=NOW - 99),
        heartbeat(1, 6, since=NOW - 10),
        heartbeat(2, 6, since=NOW - 40),
        heartbeat(3, 6, since=NOW - 50, waits=True),
    ]
    assert slowest(heartbeats).rank == 2
    message = hang_message(heartbeats, folder="heartbeats", now=NOW)
    assert "rank 2 on n2 (process 7) has been in step 6, student, for 40 s" in message


@pytest.mark.parametrize(
    ("keep", "gone"),
    [({}, []), ({"keep_last": 2}, [1, 2, 3, 4]), ({"keep_last": 1, "keep_every": 2}, [1, 3, 5])],
)
def test_which_checkpoints_go(keep, gone):
    assert expired_checkpoints([6, 1, 2, 3, 4, 5], RunSettings(dir="r", **keep)) == gone


def test_a_job_is_stopped_before_its_end():
    now = [100.0]
    request = StopRequest(margin=300.0, clock=lambda: now[0])
    assert request.reason(next_seconds=1e9) is None
    request.end_at = 1000.0
    assert request.reason(next_seconds=599.0) is None
    assert request.reason(next_seconds=600.0) == "the job's time limit in 900 s (run.exit_before_limit_s=300)"
    now[0] = 700.0
    assert request.reason() == "the job's time limit in 300 s (run.exit_before_limit_s=300)"


def test_signals_are_noted_and_handlers_given_back():
    before = signal.getsignal(signal.SIGUSR1)
    with StopRequest() as request:
        assert request.reason() is None
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)
        assert request.reason() == "SIGUSR1"
    assert signal.getsignal(signal.SIGUSR1) == before


def test_a_second_control_c_ends_a_run_at_once(monkeypatch):
    """The first one lets it stop after its step. A rank leaves both to its launcher."""
    called = []
    # A shell starts background jobs so that they ignore SIGINT, and the tests may be one.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.delenv("RANK", raising=False)
    with StopRequest(on_interrupt=lambda: called.append("first")) as request:
        signal.raise_signal(signal.SIGINT)
        assert (request.reason(), called) == ("SIGINT", ["first"])
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert called == ["first"]
    monkeypatch.setenv("RANK", "0")
    with StopRequest(on_interrupt=lambda: called.append("rank")) as request:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert request.reason() == "SIGINT"
    assert called == ["first"]
    signal.signal(signal.SIGINT, before)


def test_a_background_job_still_ignores_control_c():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopRequest() as request:
            signal.raise_signal(signal.SIGINT)
            assert request.reason() is None
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_end_of_a_job(tmp_path, monkeypatch):
    assert job_end({}) is None
    assert job_end({"SLURM_JOB_ID": "5", "SLURM_JOB_END_TIME": "1700000000"}) == 1_700_000_000.0
    squeue = tmp_path / "squeue"
    for end, expected in (
        ("2023-11-14T22:13:20", time.mktime((2023, 11, 14, 22, 13, 20, 0, 0, -1))),
        ("N/A", None),
    ):
        squeue.write_text(f'#!/bin/sh\n[ "$*" = "--noheader --jobs=5 --format=%e" ] && echo {end}\n')
        squeue.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
        assert job_end({"SLURM_JOB_ID": "5"}) == expected


def test_the_status_of_a_stopped_rank():
    assert exit_status({}) == 75
    assert exit_status({"TORCHELASTIC_RUN_ID": "x"}) == 0
