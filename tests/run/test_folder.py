"""The run folder on the disk: how it starts, resumes, and withstands a disk that refuses."""

import json
import math

import pytest
from ruamel.yaml import YAML

from megatron_paint.base.errors import UserError
from megatron_paint.base.json_text import to_json
from megatron_paint.config.saved import forbidden_changes
from megatron_paint.evaluation.statistics import build_report
from megatron_paint.records import Graded
from megatron_paint.run.folder import RunFolder
from megatron_paint.runtime.files import NewFolder


def settings(path, **changes):
    """Settings as nested dictionaries, changed by dotted key."""
    nested = {
        "model": {"hf_path": "m", "lora": None},
        "data": {"problems_per_step": 32, "micro_batch_tokens": 100},
        "run": {"dir": str(path), "steps": 100, "save_every": 25, "resume": "never", "seed": 1},
        "optimizer": {"lr": 5.0e-6, "eps": 1.0e-8, "decay": "constant", "decay_steps": None},
        "megatron": {"tensor_model_parallel_size": 1},
    }
    for key, value in changes.items():
        section, name = key.split("__")
        nested[section][name] = value
    return nested


def started(path, steps=0, *, checkpoints=()):
    """A run folder that has made some steps."""
    folder = RunFolder(path)
    folder.prepare(settings(path))
    for step in range(1, steps + 1):
        folder.append_metrics({"step": step, "loss": 1 / step})
        folder.write_samples(step, [{"id": "a", "step": step}])
    for step in checkpoints:
        written(folder.checkpoint_folder(step), mark=True)
    return folder


def written(path, *, mark=False):
    """A folder that was filled and finished."""
    made = NewFolder(path)
    made.begin()
    (made.unfinished / "weights").write_text("x")
    made.finish(mark=mark)


# Starting and going on


def test_a_new_folder(tmp_path):
    folder = RunFolder(tmp_path / "runs" / "x")
    assert folder.prepare(settings(folder.path)) == 0
    text = folder.config_file.read_text()
    assert YAML(typ="safe").load(text) == settings(folder.path)
    assert {entry.name for entry in folder.path.iterdir()} == {
        "config.yaml", "metrics.jsonl", "samples", "eval", "checkpoints", "logs",
    }  # fmt: skip


def test_the_real_settings_can_be_written_and_resumed(tmp_path):
    config = pytest.importorskip("megatron_paint.config.settings")
    made = config.Settings(
        model=config.ModelSettings(hf_path="m"),
        data=config.DataSettings(train="t.jsonl"),
        run=config.RunSettings(dir=str(tmp_path / "x"), resume="auto"),
    )
    assert RunFolder(made.run.dir).prepare(made) == 0
    assert RunFolder(made.run.dir).prepare(made) == 0


def test_a_folder_that_holds_something_is_refused(tmp_path):
    started(tmp_path)
    with pytest.raises(UserError, match=r"not empty.*run\.resume=auto"):
        RunFolder(tmp_path).prepare(settings(tmp_path))


def test_log_files_of_the_batch_system_may_be_there(tmp_path):
    (tmp_path / "logs").mkdir()
    assert RunFolder(tmp_path).prepare(settings(tmp_path)) == 0


@pytest.mark.parametrize("name", [".config.yaml.4711.unfinished", ".probe.4711.unfinished"])
@pytest.mark.parametrize("resume", ["never", "auto"])
def test_a_start_that_was_killed_in_its_first_write_can_be_repeated(tmp_path, name, resume):
    (tmp_path / name).write_text("model: ")
    assert RunFolder(tmp_path).prepare(settings(tmp_path, run__resume=resume)) == 0
    assert not list(tmp_path.rglob("*.unfinished"))


def test_a_foreign_folder_is_never_taken_for_a_run(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="neither empty nor a run folder"):
        RunFolder(tmp_path).prepare(settings(tmp_path, run__resume="auto"))


def test_resume_goes_on_from_the_newest_complete_checkpoint(tmp_path):
    folder = started(tmp_path, 8, checkpoints=(2, 5))
    NewFolder(folder.checkpoint_folder(7)).begin()  # a crash came before its end
    folder.checkpoint_folder(8).mkdir()
    for step in (4, 6):
        folder.write_eval(build_report(step, "tiny", [graded("a")]))
    assert folder.checkpoints() == [2, 5]
    assert RunFolder(tmp_path).prepare(settings(tmp_path, run__resume="auto")) == 5
    assert [line["step"] for line in folder.read_metrics()] == [1, 2, 3, 4, 5]
    assert folder.samples_file(5).exists()
    assert not folder.samples_file(6).exists()
    assert folder.evaluated_steps() == [4]
    assert {entry.name for entry in (tmp_path / "checkpoints").iterdir()} >= {"step_000002", "step_000005"}
    assert not list(tmp_path.rglob("*.unfinished"))


def test_what_stands_of_a_step(tmp_path):
    folder = started(tmp_path, checkpoints=(2,))
    (folder.checkpoint_folder(4)).mkdir()  # without its marker
    written(folder.hf_folder(2))
    NewFolder(folder.hf_folder(4)).begin()
    folder.write_eval(build_report(2, "tiny", [graded("a")]))
    for task in ("checkpoint", "export", "evaluation"):
        assert folder.holds(task, 2)
        assert not folder.holds(task, 4)


def test_resume_before_the_first_checkpoint_starts_over(tmp_path):
    folder = started(tmp_path, 3)
    assert folder.prepare(settings(tmp_path, run__resume="auto")) == 0
    assert folder.read_metrics() == []
    with pytest.raises(UserError, match="no complete checkpoint"):
        folder.prepare(settings(tmp_path, run__resume="required"))


def test_changed_settings_are_named(tmp_path):
    started(tmp_path, 3, checkpoints=(2,))
    new = settings(tmp_path, run__resume="auto", optimizer__lr=1.0e-5, run__seed=2, model__lora={"rank": 8})
    with pytest.raises(UserError) as caught:
        RunFolder(tmp_path).prepare(new)
    message = str(caught.value)
    assert "optimizer.lr: 5e-06 -> 1e-05" in message
    assert "run.seed: 1 -> 2" in message
    assert "model.lora" in message
    assert "data." not in message
    assert len(RunFolder(tmp_path).read_metrics()) == 3  # nothing was touched


def test_some_settings_may_change(tmp_path):
    started(tmp_path, 3, checkpoints=(2,))
    new = settings(
        tmp_path,
        run__resume="auto",
        run__steps=200,
        run__save_every=5,
        megatron__tensor_model_parallel_size=2,
        data__micro_batch_tokens=50,
    )
    folder = RunFolder(tmp_path)
    assert folder.prepare(new) == 2
    assert "steps: 200" in folder.config_file.read_text()


def test_a_decay_does_not_move(tmp_path):
    """run.steps may change where the schedule keeps its end, and the refusal says how to keep it."""
    folder = RunFolder(tmp_path)
    cosine = {"run__resume": "auto", "optimizer__decay": "cosine"}
    folder.prepare(settings(tmp_path, **cosine))
    with pytest.raises(UserError) as caught:
        folder.prepare(settings(tmp_path, **cosine, run__steps=200))
    assert "would end at step 200" in str(caught.value)
    assert "Set optimizer.decay_steps=100" in str(caught.value)
    folder.prepare(settings(tmp_path, **cosine, run__steps=200, optimizer__decay_steps=100))
    folder.prepare(settings(tmp_path, **cosine, run__steps=300, optimizer__decay_steps=100))
    folder.prepare(settings(tmp_path, **cosine, run__steps=100))
    with pytest.raises(UserError, match=r"Set optimizer\.decay_steps=100"):
        folder.prepare(settings(tmp_path, **cosine, optimizer__decay_steps=50))


def test_a_run_does_not_end_before_its_newest_checkpoint(tmp_path):
    started(tmp_path, 5, checkpoints=(2, 5))
    with pytest.raises(UserError, match=r"run\.steps=4 is before step 5.*set run\.steps to 5 or more"):
        RunFolder(tmp_path).prepare(settings(tmp_path, run__resume="auto", run__steps=4))
    assert len(RunFolder(tmp_path).read_metrics()) == 5


def test_an_unreadable_config_is_a_user_error(tmp_path):
    folder = started(tmp_path)
    folder.config_file.write_text("a: [")
    with pytest.raises(UserError, match=r"config\.yaml"):
        folder.prepare(settings(tmp_path, run__resume="auto"))


# Metrics, samples and evaluations


def test_a_line_that_a_crash_cut_short_is_dropped(tmp_path):
    folder = started(tmp_path, 3, checkpoints=(3,))
    with open(folder.metrics_file, "a") as stream:
        stream.write('{"step": 4, "lo')
    assert [line["step"] for line in folder.read_metrics()] == [1, 2, 3]
    folder.prepare(settings(tmp_path, run__resume="required"))
    folder.append_metrics({"step": 4})
    assert [json.loads(line)["step"] for line in folder.metrics_file.read_text().splitlines()] == [1, 2, 3, 4]


def test_json_is_strict():
    assert (
        to_json({"a": math.nan, "b": [math.inf, 1.5], "c": "∑", "d": (1,)})
        == '{"a": null, "b": [null, 1.5], "c": "∑", "d": [1]}'
    )


def test_samples_round_trip(tmp_path):
    folder = started(tmp_path)
    lines = [{"id": "a", "text": "line\nbreak\u2028 \x00"}, {"id": "b", "text": "\ud800"}]
    folder.write_samples(7, lines)
    assert folder.read_samples(7) == lines
    assert folder.samples_file(7).name == "step_000007.jsonl"
    with pytest.raises(UserError, match="steps 7 to 7"):
        folder.read_samples(8)
    with folder.samples_file(7).open("a") as file:
        file.write('{"id": "c", "te')
    with pytest.raises(UserError, match=r"step_000007\.jsonl: line 3 is damaged"):
        folder.read_samples(7)


def graded(problem):
    return Graded(
        problem_id=problem,
        sample_index=0,
        response_text="\\boxed{1}",
        num_tokens=3,
        finished=True,
        outcome="right",
        extracted="1",
    )


def test_evaluations_round_trip(tmp_path):
    folder = started(tmp_path)
    report = build_report(25, "tiny", [graded("a"), graded("b")])
    folder.write_eval(report)
    assert folder.read_eval(25) == report
    with pytest.raises(UserError, match="steps evaluated: 25"):
        folder.read_eval(26)


def test_a_setting_that_an_earlier_version_did_not_have_stood_at_its_default():
    """clip_rule is new: at its default nothing has changed, at another value it has."""
    old = {"objective": {"loss": {"clip": 0.05}}}
    same = {"objective": {"loss": {"clip": 0.05, "clip_rule": "entry"}}}
    other = {"objective": {"loss": {"clip": 0.05, "clip_rule": "token"}}}
    assert forbidden_changes(old=old, new=same) == []
    assert forbidden_changes(old=old, new=other) == ["objective.loss.clip_rule: 'entry' -> 'token'"]


# Changes on purpose


def allowed(path, *names, **changes):
    return settings(path, run__resume="auto", run__allow_changes=list(names), **changes)


def test_a_setting_that_the_user_allows_changes_and_is_recorded(tmp_path):
    started(tmp_path, 3, checkpoints=(2,))
    folder = RunFolder(tmp_path)
    with pytest.raises(UserError, match=r"run\.allow_changes=\[optimizer\.lr\]$"):
        folder.prepare(settings(tmp_path, run__resume="auto", optimizer__lr=1.0e-5))
    with pytest.raises(UserError, match=r"run\.seed: 1 -> 2") as caught:
        folder.prepare(allowed(tmp_path, "optimizer.lr", optimizer__lr=1.0e-5, run__seed=2))
    assert "optimizer.lr: " not in str(caught.value)
    assert not (tmp_path / "changes.jsonl").exists()
    new = allowed(tmp_path, "optimizer.lr", optimizer__lr=1.0e-5)
    assert folder.allowed_changes(new) == {"optimizer.lr": (5.0e-6, 1.0e-5)}
    assert folder.prepare(new) == 2
    (line,) = map(json.loads, (tmp_path / "changes.jsonl").read_text().splitlines())
    assert (line["after_step"], line["setting"], line["old"], line["new"]) == (2, "optimizer.lr", 5.0e-6, 1.0e-5)
    folder.prepare(settings(tmp_path, run__resume="auto", optimizer__lr=1.0e-5))  # from now on it is the run's
    assert len((tmp_path / "changes.jsonl").read_text().splitlines()) == 1


def test_an_end_of_the_decay_that_the_user_allows_to_move(tmp_path):
    folder = RunFolder(tmp_path)
    folder.prepare(settings(tmp_path, optimizer__decay="cosine"))
    longer = {"optimizer__decay": "cosine", "run__steps": 200}
    with pytest.raises(UserError, match=r"run\.allow_changes=\[optimizer\.decay_steps\]"):
        folder.prepare(allowed(tmp_path, "optimizer.lr", **longer))
    folder.prepare(allowed(tmp_path, "optimizer.decay_steps", **longer))
    line = json.loads((tmp_path / "changes.jsonl").read_text())
    assert (line["setting"], line["old"], line["new"]) == ("optimizer.decay_steps", 100, 200)


def test_what_a_checkpoint_holds_is_not_offered(tmp_path):
    started(tmp_path, 3, checkpoints=(2,))
    with pytest.raises(UserError, match=r"optimizer\.eps: 1e-08 -> 1e-07.*another run\.dir$"):
        RunFolder(tmp_path).prepare(settings(tmp_path, run__resume="auto", optimizer__eps=1.0e-7))


def test_only_those_changes_are_offered_that_can_be_allowed(tmp_path):
    """The offered option names what is allowed already, and a shell takes it as one word."""
    started(tmp_path, 3, checkpoints=(2,))
    changed = {"optimizer__lr": 1.0e-5, "run__seed": 2, "data__problems_per_step": 7}
    message = r"on purpose with run\.allow_changes=\[optimizer\.lr,data\.problems_per_step,run\.seed\]$"
    with pytest.raises(UserError, match=message):
        RunFolder(tmp_path).prepare(allowed(tmp_path, "optimizer.lr", **changed))
    message = (
        r"another run\.dir\. optimizer\.eps cannot change when a run resumes; run\.allow_changes=\[run\.seed\] allows "
        "the other$"
    )
    with pytest.raises(UserError, match=message):
        RunFolder(tmp_path).prepare(settings(tmp_path, run__resume="auto", optimizer__eps=1.0e-7, run__seed=2))


def test_a_setting_that_only_an_earlier_version_had_is_not_offered(tmp_path):
    started(tmp_path, 3, checkpoints=(2,))
    file = tmp_path / "config.yaml"
    file.write_text(file.read_text().replace("run:\n", "run:\n  old_name: 5\n"))
    with pytest.raises(UserError, match=r"run\.old_name: 5 -> '\(absent\)'.*another run\.dir$"):
        RunFolder(tmp_path).prepare(settings(tmp_path, run__resume="auto"))


@pytest.mark.parametrize(
    ("resume", "command"), [("never", "the same command with run.resume=auto"), ("auto", "the same command")]
)
def test_how_an_ended_run_continues(resume, command, tmp_path):
    """The setting is named only if the command does not have it yet."""
    folder = RunFolder(tmp_path / "run")
    assert folder.kept_text().endswith("so the same command with run.resume=auto begins it again")  # there is nothing
    folder.prepare(settings(tmp_path / "run", run__resume=resume))
    assert folder.kept_text() == f"{folder.path} has no checkpoint yet, so {command} begins it again"


# A folder that cannot be written


@pytest.mark.parametrize("name", ["file/below", "/proc/none", "x" * 300], ids=["below a file", "proc", "long name"])
def test_a_folder_that_cannot_be_made_is_refused_before_the_run(tmp_path, name):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"^run\.dir(: Cannot write |=.* cannot be written: /proc is)"):
        RunFolder(tmp_path / name).check(settings(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_check_leaves_nothing_behind(tmp_path):
    assert RunFolder(tmp_path / "a" / "b").check(settings(tmp_path)) == 0
    assert list(tmp_path.iterdir()) == []
