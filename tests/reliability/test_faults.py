"""Faults without a cluster: each ends in a run that resumes without a loss, or in one clear error."""

import json
import re
import shutil
from pathlib import Path

import pytest

from megatron_paint.objectives.metric_table import METRICS
from megatron_paint.run.console_log import CONSOLE_LOG
from megatron_paint.run.folder import RunFolder
from megatron_paint.run.status import read_status
from megatron_paint.runtime.checksums import CHECKSUMS
from megatron_paint.runtime.heartbeat import read_heartbeats
from tests.support import forked_ranks
from tests.support.exports import same, weights_of_step
from tests.support.results import metrics

SPOILT = "tests.reliability.spoilt"


def train(trained, folder, *arguments, target=None, **how):
    """A run in a separate folder, without evaluation."""
    arguments = (f"run.dir={folder / 'run'}", "evaluation.problems=null", "run.resume=auto", *arguments)
    if target is None:
        return forked_ranks.train(folder, trained.settings, *arguments, **how)
    command = ("train", trained.settings, *arguments, "--json")
    return forked_ranks.run(folder, *command, target=f"{SPOILT}:{target}", **how)


def events(ended, kind):
    return [event for event in map(json.loads, ended.out[0].splitlines()) if event["event"] == kind]


def check_is_as_if_unbroken(run, trained):
    assert same(weights_of_step(run, 4), weights_of_step(trained.run, 4))
    assert metrics(run) == metrics(trained.run)


def test_a_signal_to_one_rank_stops_all_with_a_checkpoint(trained, tmp_path):
    """Rank 1 gets two signals in step 2: all stop after it, and the run resumes to the weights of an unbroken one."""
    run = tmp_path / "run"
    ended = train(trained, tmp_path, "run.save_every=0", target="signalled")
    assert ended.statuses == [75, 75], ended
    (stopped,) = events(ended, "result")
    assert (stopped["step"], stopped["reason"]) in ((2, "SIGUSR1"), (2, "SIGTERM"))
    assert RunFolder(run).checkpoints() == [2]
    assert read_status(run).state == "stopped"
    again = train(trained, tmp_path, "run.save_every=0")
    assert again.statuses == [0, 0], again
    assert [event["step"] for event in events(again, "step")] == [3, 4]
    check_is_as_if_unbroken(run, trained)
    assert read_status(run).state == "finished"


@pytest.mark.parametrize(("target", "step"), [("in_a_job_that_ends_soon", 0), ("in_a_job_that_ends_in_step_1", 1)])
def test_the_end_of_the_job_stops_a_run(trained, tmp_path, target, step):
    """A job that ends in 200 s, of which 300 are to be left, as it is told at the start or as time goes by."""
    ended = train(trained, tmp_path, target=target)
    assert ended.statuses == [75, 75], ended
    (stopped,) = events(ended, "result")
    assert stopped["step"] == step
    assert re.fullmatch(r"the job's time limit in (1\d\d|200) s \(run.exit_before_limit_s=300\)", stopped["reason"])
    assert RunFolder(tmp_path / "run").checkpoints() == [step][:step]


def test_a_signal_before_the_first_step(trained, tmp_path):
    """Rank 1 gets it while it loads the model; nothing was done, and the same command does all."""
    ended = train(trained, tmp_path, target="signalled_at_the_start")
    assert ended.statuses == [75, 75], ended
    (stopped,) = events(ended, "result")
    assert "Stopped before the first step by SIGUSR1" in stopped["message"]
    assert RunFolder(tmp_path / "run").checkpoints() == []
    again = train(trained, tmp_path)
    assert again.statuses == [0, 0], again
    check_is_as_if_unbroken(tmp_path / "run", trained)


def test_training_goes_on_while_a_checkpoint_is_written(trained, tmp_path):
    """The checkpoint of step 2 is held back until step 3 is done, and yet it is that of step 2."""
    run = tmp_path / "run"
    ended = train(trained, tmp_path, target="slow_to_write")
    assert ended.statuses == [0, 0], ended
    assert [event["message"] for event in events(ended, "held")] == ["checkpoints after step 3: []"]
    check_is_as_if_unbroken(run, trained)
    shutil.rmtree(run / "checkpoints" / "step_000004")
    shutil.rmtree(run / "hf")
    again = train(trained, tmp_path)
    assert [event["step"] for event in events(again, "step")] == [3, 4]
    check_is_as_if_unbroken(run, trained)


def truncate(file: Path) -> str:
    file.write_bytes(file.read_bytes()[:-100])
    return "bytes, not"


def flip(file: Path) -> str:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return "its SHA-256 is different"


def remove(file: Path) -> str:
    file.unlink()
    return "is missing"


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        pytest.param("__1_0.distcp", truncate, marks=pytest.mark.long),
        ("__0_0.distcp", flip),
        (".metadata", remove),
        pytest.param(CHECKSUMS, remove, marks=pytest.mark.long),
    ],
)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_taken(trained, tmp_path, name, spoil):
    run = tmp_path / "run"
    ignored = shutil.ignore_patterns("step_000004.json*", "hf", "eval")
    shutil.copytree(trained.run, run, ignore=ignored)
    what = spoil(run / "checkpoints" / "step_000004" / name)
    ended = train(trained, tmp_path, f"evaluation.problems={trained.folder / 'problems.jsonl'}", "evaluation.limit=3")
    assert ended.statuses == [0, 0], ended
    (warning,) = [e["message"] for e in events(ended, "warning") if "damaged" in e["message"]]
    assert f"step_000004 is damaged: {name} " in warning
    assert what in warning
    assert warning.endswith("It is damaged_1_step_000004 now")
    assert [event["step"] for event in events(ended, "step")] == [3, 4]
    assert RunFolder(run).checkpoints() == [2, 4]
    assert read_status(run).damaged == ("damaged_1_step_000004",)
    check_is_as_if_unbroken(run, trained)


def test_nothing_is_touched_where_no_checkpoint_is_whole(trained, tmp_path):
    """The disk may be at fault; a new start would remove everything that the run has written."""
    run = tmp_path / "run"
    shutil.copytree(trained.run, run)
    for step in (2, 4):
        truncate(run / "checkpoints" / f"step_{step:06d}" / CHECKSUMS)

    def contents():
        return {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != CONSOLE_LOG}

    before = contents()
    message = forked_ranks.train(tmp_path, trained.settings, f"run.dir={run}", "run.resume=auto").message
    assert "step_000004 is damaged: checksums.json differs from what was written" in message
    assert ", and no other checkpoint is complete. Nothing was changed" in message
    assert contents() == before
    assert message in (run / "logs" / CONSOLE_LOG).read_text()


def test_another_setting_is_refused_before_a_damaged_checkpoint_is_set_aside(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained.run, run)
    truncate(run / "checkpoints" / "step_000004" / CHECKSUMS)
    assert "optimizer.lr" in train(trained, tmp_path, "optimizer.lr=0.5").message
    assert (run / "checkpoints" / "step_000004").is_dir()


def test_old_checkpoints_go_when_newer_ones_are_whole(trained, tmp_path):
    arguments = ("run.steps=6", "run.save_every=1", "run.keep_last=2", "run.keep_every=3")
    ended = train(trained, tmp_path, *arguments)
    assert ended.statuses == [0, 0], ended
    assert RunFolder(tmp_path / "run").checkpoints() == [3, 5, 6]
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 3


def test_steps_without_a_finite_loss_are_left_out_up_to_a_limit(trained, tmp_path):
    ended = train(trained, tmp_path, "run.max_skipped_steps=2", target="not_finite")
    assert ended.statuses == [0, 0], ended
    warnings = [event["message"] for event in events(ended, "warning")]
    assert warnings[:2] == [
        "step 2 is skipped (1 of at most 2): loss is not finite in step 2",
        "step 3 is skipped (2 of at most 2): loss is not finite in step 3",
    ]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], "skipped" in line) for line in lines] == [(1, False), (2, True), (3, True), (4, False)]
    assert all(set(line) <= set(METRICS) for line in lines)
    assert read_status(tmp_path / "run").skipped == 2


def test_one_step_too_many_without_a_finite_loss_ends_the_run(trained, tmp_path):
    message = train(trained, tmp_path, "run.max_skipped_steps=1", target="not_finite").message
    assert "step 3 stopped before the optimiser: loss is not finite in step 3; 1 step was skipped before" in message


def test_a_hang_names_the_rank_that_is_behind(trained, tmp_path):
    run = tmp_path / "run"
    arguments = ("run.save_every=1", "run.hang_timeout_s=8", "run.tensorboard=false")  # little that a disk can hold up
    ended = train(trained, tmp_path, *arguments, target="hanging")
    assert ended.statuses == [70, 70], ended
    (line,) = [line for line in ended.err[0].splitlines() if "no progress" in line]
    assert "no progress: rank 1 on " in line
    assert "has been in step 2, rollout, for " in line
    assert "no progress" not in ended.err[1]
    stacks = (run / "logs" / "heartbeats" / "stacks_00001.txt").read_text()
    assert "in hang_here" in stacks
    assert (run / "logs" / "heartbeats" / "stacks_00000.txt").exists()
    assert all(heartbeat.hung for heartbeat in read_heartbeats(run / "logs" / "heartbeats"))
    assert read_status(run).state == "hung"
    again = train(trained, tmp_path, "run.hang_timeout_s=60")
    assert again.statuses == [0, 0], again
    check_is_as_if_unbroken(run, trained)
