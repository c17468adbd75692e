"""Loggers get every step, and none of them ends a run."""

import builtins
import gc
import math
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from megatron_paint.base.errors import UserError
from megatron_paint.config.load import settings_of
from megatron_paint.run.folder import RunFolder
from megatron_paint.run.loggers import background as background_module
from megatron_paint.run.loggers import loggers as loggers_module
from megatron_paint.run.loggers.background import BackgroundLogger
from megatron_paint.run.loggers.loggers import Loggers, logger_names, open_loggers, run_info
from megatron_paint.run.loggers.remote_ids import read_ids, write_ids
from megatron_paint.run.loggers.samples import sample_table
from tests.run.loggers.stand_ins import Recorded, evaluation, report


def loggers(*made, samples_every=2):
    printed = []
    opened = Loggers(
        made,
        samples_every=samples_every,
        note=lambda line: printed.append(f"note {line}"),
        warn=lambda line: printed.append(f"warning {line}"),
    )
    opened.open()
    return opened, printed


def settings(path, **run):
    tree = {"model": {"hf_path": "m"}, "data": {"train": "p.jsonl"}, "run": {"dir": str(path), **run}}
    return settings_of({**tree, "evaluation": {"problems": "data/held_out.jsonl"}})


@pytest.mark.parametrize("in_background", [False, True])
def test_a_logger_gets_everything_in_order(in_background):
    mine = Recorded(in_background=in_background)
    opened, printed = loggers(mine)
    opened.evaluation(evaluation(0))
    for step in (1, 2, 3):
        opened.step(*report(step, **{"overlap/mean": math.nan, "skipped": "text"}))
    opened.close("finished")
    opened.step(*report(4))  # nothing more
    opened.close("failed")
    kinds = [call[:2] for call in mine.calls]
    assert kinds == [
        *[("open",), ("metrics", 0), ("metrics", 1), ("samples", 1), ("metrics", 2), ("samples", 2), ("metrics", 3)],
        ("close", "finished"),
    ]
    assert mine.calls[1][2]["eval/tiny/avg"] == 1.0
    assert mine.calls[2][2] == {"loss": 0.5}
    assert printed == ["note mine: logging to http://(hidden)@host/1"]


@pytest.mark.parametrize("in_background", [False, True])
@pytest.mark.parametrize("method", ["open", "metrics", "samples", "close"])
def test_an_error_is_one_line_and_ends_only_this_logger(method, in_background):
    error = RuntimeError("no route\nto http://me:pw@host")
    broken = Recorded("broken", fails={method: [error]}, in_background=in_background)
    other = Recorded("other")
    opened, printed = loggers(broken, other)
    for step in (1, 2, 3):
        opened.step(*report(step))
    opened.close("stopped")
    warnings = [line for line in printed if line.startswith("warning")]
    assert warnings == [
        "warning broken: RuntimeError: no route to http://(hidden)@host. The run continues without it; repair it"
    ]
    assert ("close", "stopped") not in broken.calls
    assert [call[1] for call in other.calls if call[0] == "metrics"] == [1, 2, 3]
    assert other.calls[-1] == ("close", "stopped")


def test_what_waits_for_the_network_is_sent_later():
    mine = Recorded(fails={"metrics": [OSError("down"), OSError("down")]}, temporary=True)
    sender = BackgroundLogger(mine, pause=0.01)
    sender.open()
    for step in (1, 2):
        sender.call(lambda step=step: mine.metrics(step, {}))
    while len(mine.calls) < 3:
        time.sleep(0.01)
    sender.close("finished")
    sender.wait_closed(10)
    assert mine.calls == [("open",), ("metrics", 1, {}), ("metrics", 2, {}), ("close", "finished")]
    assert sender.failure is None
    assert list(sender.notices) == [
        "logging to http://me:secret@host/1",
        "down; its values wait, and are sent later",
        "the connection works again",
    ]


def test_a_network_that_is_gone_holds_up_neither_a_step_nor_the_end(monkeypatch):
    monkeypatch.setattr(background_module, "MOST_WAITING", 5)
    mine, gone = Recorded(), threading.Event()
    mine.metrics = lambda step, values: gone.wait()
    sender = BackgroundLogger(mine)
    sender.open()
    begun = time.monotonic()
    sender.call(lambda: mine.metrics(1, {}))
    sender.close("finished")
    sender.wait_closed(0.05)
    assert time.monotonic() - begun < 5
    assert "not everything was sent within 60 seconds" in str(sender.failure)
    full = BackgroundLogger(mine)
    full.open()
    for step in range(10):
        full.call(lambda step=step: mine.metrics(step, {}))
    assert "5 records wait" in str(full.failure)
    gone.set()


def test_several_networks_that_are_gone_hold_up_a_run_as_long_as_one(monkeypatch):
    monkeypatch.setattr(loggers_module, "OPEN_SECONDS", 0.5)
    monkeypatch.setattr(loggers_module, "CLOSE_SECONDS", 0.5)
    gone, made = threading.Event(), [Recorded(name, in_background=True) for name in "abcd"]
    for one in made:
        one.open = gone.wait
    begun = time.monotonic()
    opened, printed = loggers(*made)
    opened.close("finished")
    assert time.monotonic() - begun < 1.8
    assert len(printed) == 4
    gone.set()


class Metrics(dict):
    """Metrics that a weak reference may follow."""


def test_a_call_that_waits_keeps_no_report():
    gone, mine = threading.Event(), Recorded(in_background=True)
    mine.metrics = lambda step, values: gone.wait()
    opened, _ = loggers(mine, samples_every=1)
    made, lines = report(1)
    made = replace(made, metrics=Metrics(made.metrics))
    opened.step(made, lines)
    opened.step(made, lines)
    kept = weakref.ref(made.metrics)
    del made
    gc.collect()
    assert kept() is None
    gone.set()
    opened.close("finished")


@pytest.mark.parametrize("name", ["wandb", "mlflow", "tensorboard"])
def test_a_package_that_is_not_installed_is_one_line(name, tmp_path, monkeypatch):
    real = builtins.__import__

    def refuse(module, *args, **kwargs):
        if module.split(".")[0] == name or module.startswith(f"torch.utils.{name}"):
            raise ImportError(f"no {name}")
        return real(module, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    run = {"loggers": [name]} if name != "tensorboard" else {}
    lines = []
    made = settings(tmp_path / "run", tensorboard=name == "tensorboard", **run)
    opened = open_loggers(made, RunFolder(tmp_path / "run"), start=0, note=lines.append, warn=lines.append)
    opened.step(*report(1))
    opened.close("finished")
    (line,) = lines
    assert line.startswith(f"{name}: it is not installed: pip install ")
    assert line.endswith("The run continues without it")


def test_names_and_contradictions(tmp_path):
    assert logger_names(settings(tmp_path).run) == ["tensorboard"]
    assert logger_names(settings(tmp_path, loggers=["wandb", "tensorboard"]).run) == ["tensorboard", "wandb"]
    assert logger_names(settings(tmp_path, loggers=["mlflow"], tensorboard=False).run) == ["mlflow"]
    with pytest.raises(UserError, match=r"run\.loggers names tensorboard, and run\.tensorboard=false"):
        settings(tmp_path, loggers=["tensorboard"], tensorboard=False)
    with pytest.raises(UserError, match=r"run\.loggers names a logger twice"):
        settings(tmp_path, loggers=["wandb", "wandb"])
    with pytest.raises(UserError, match=r"run\.loggers"):
        settings(tmp_path, loggers=["comet"])


def test_what_loggers_know_of_a_run(tmp_path):
    made = settings(tmp_path, name="mine", project="ours")
    known = run_info(made, RunFolder(tmp_path), start=3)
    assert (known.name, known.project, known.folder, known.resume_step) == ("mine", "ours", tmp_path, 3)
    assert known.results == ("loss", "eval/held_out/avg")
    assert known.settings["optimizer"]["lr"] == 5.0e-6


def test_loggers_of_a_resumed_run_may_change(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.prepare(settings(folder.path))
    changed = settings(folder.path, resume="auto", loggers=["wandb"], name="x", project="y", log_samples_every=7)
    assert folder.check(changed) == 0


def test_a_table_of_samples():
    made, lines = report(1, text="x" * 3000)
    table = sample_table(made, lines)
    row = dict(zip(table.columns, table.rows[0], strict=True))
    assert (row["id"], row["tokens"], row["reveal"], row["loss"]) == ("p1", 3, None, 0.5)
    assert (row["problem"], row["shown to the teacher"]) == ("1 + 1?", "")
    assert row["response"] == "x" * 2000 + " ... (3,000 characters)"


def test_ids_are_kept_and_a_damaged_file_is_none(tmp_path):
    assert read_ids(tmp_path, "wandb") == {}
    write_ids(tmp_path, "wandb", {"id": "a"})
    write_ids(tmp_path, "mlflow", {"run_id": "b"})
    assert read_ids(tmp_path, "wandb") == {"id": "a"}
    (tmp_path / "loggers.json").write_text("{")
    assert read_ids(tmp_path, "wandb") == {}
    write_ids(tmp_path, "wandb", {"id": "c"})
    assert read_ids(tmp_path, "wandb") == {"id": "c"}


def test_threads_that_write_their_ids_at_the_same_time_lose_none(tmp_path):
    names = [f"logger{number}" for number in range(16)]
    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(lambda name: write_ids(tmp_path, name, {"id": name}), names))
    assert [read_ids(tmp_path, name) for name in names] == [{"id": name} for name in names]
