"""The run folder on the disk, and the lines that a step leaves in it."""

import errno
import json
import math
import os

import pytest

from megatron_paint.errors import UserError
from megatron_paint.evaluation.statistics import build_report
from megatron_paint.records import Anchor, Graded, Overlap, Problem, Reveal, Rollout, Sample, SampleScore, StepReport
from megatron_paint.run.folder import RunFolder
from megatron_paint.run.report import ClipWatch, metrics_of, sample_lines
from megatron_paint.run.writing import append_line, folder_atomically, to_json, write_atomically


def settings(path, **changes):
    """Settings as nested dictionaries, changed by dotted key."""
    nested = {
        "model": {"hf_path": "m", "lora": None},
        "data": {"problems_per_step": 32, "micro_batch_tokens": 100},
        "run": {"dir": str(path), "steps": 100, "save_every": 25, "resume": "never", "seed": 1},
        "optimizer": {"lr": 5.0e-6, "eps": 1.0e-8},
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
        folder.begin_checkpoint(step)
        folder.finish_checkpoint(step)
    return folder


# Starting and going on


def test_a_new_folder(tmp_path):
    folder = RunFolder(tmp_path / "runs" / "x")
    assert folder.prepare(settings(folder.path)) == 0
    text = folder.config_file.read_text()
    assert "lr: 5" in text and "lora: null" in text or "lora:\n" in text
    assert {entry.name for entry in folder.path.iterdir()} == {
        "config.yaml", "metrics.jsonl", "samples", "eval", "checkpoints", "logs",
    }  # fmt: skip


def test_the_real_settings_can_be_written_and_resumed(tmp_path):
    config = pytest.importorskip("megatron_paint.config")
    made = config.Settings(
        model=config.ModelSettings(hf_path="m"),
        data=config.DataSettings(train="t.jsonl"),
        run=config.RunSettings(dir=str(tmp_path / "x"), resume="auto"),
    )
    assert RunFolder(made.run.dir).prepare(made) == 0
    assert RunFolder(made.run.dir).prepare(made) == 0


def test_a_folder_that_holds_something_is_refused(tmp_path):
    started(tmp_path)
    with pytest.raises(UserError, match="not empty.*run.resume=auto"):
        RunFolder(tmp_path).prepare(settings(tmp_path))


def test_log_files_of_the_batch_system_may_be_there(tmp_path):
    (tmp_path / "logs").mkdir()
    assert RunFolder(tmp_path).prepare(settings(tmp_path)) == 0


def test_a_foreign_folder_is_never_taken_for_a_run(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="no run folder"):
        RunFolder(tmp_path).prepare(settings(tmp_path, run__resume="auto"))


def test_resume_goes_on_from_the_newest_complete_checkpoint(tmp_path):
    folder = started(tmp_path, 8, checkpoints=(2, 5))
    folder.begin_checkpoint(7)  # a crash came before its end
    for step in (4, 6):
        folder.write_eval(build_report(step, "tiny", [graded("a")]))
    assert folder.checkpoints() == [2, 5]
    assert RunFolder(tmp_path).prepare(settings(tmp_path, run__resume="auto")) == 5
    assert [line["step"] for line in folder.read_metrics()] == [1, 2, 3, 4, 5]
    assert folder.samples_file(5).exists() and not folder.samples_file(6).exists()
    assert folder.evaluated_steps() == [4]


def test_a_checkpoint_that_is_written_anew_is_incomplete_meanwhile(tmp_path):
    folder = started(tmp_path, checkpoints=(5,))
    (folder.checkpoint_folder(5) / "weights").write_text("old")
    folder.begin_checkpoint(5)
    assert folder.checkpoints() == [] and list(folder.checkpoint_folder(5).iterdir()) == []


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
    assert "optimizer.lr: 5e-06 -> 1e-05" in message and "run.seed: 1 -> 2" in message and "model.lora" in message
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


def test_an_unreadable_config_is_a_user_error(tmp_path):
    folder = started(tmp_path)
    folder.config_file.write_text("a: [")
    with pytest.raises(UserError, match=r"config\.yaml"):
        folder.prepare(settings(tmp_path, run__resume="auto"))


# Disks that refuse


@pytest.mark.parametrize(
    ("code", "advice"), [(errno.EROFS, "read-only"), (errno.ENOSPC, "free space"), (errno.EACCES, "not yours")]
)
def test_a_disk_that_refuses_gives_one_clear_error(tmp_path, monkeypatch, code, advice):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(UserError, match=advice):
        RunFolder(tmp_path / "x").prepare(settings(tmp_path / "x"))
    with pytest.raises(UserError, match=advice):
        append_line(tmp_path / "metrics.jsonl", "{}")
    with pytest.raises(UserError, match=advice), folder_atomically(tmp_path / "hf") as made:
        (made / "weights").write_text("x")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["metrics.jsonl", "x"]


def test_a_run_dir_below_a_file_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"Cannot write .*file/x"):
        RunFolder(tmp_path / "file" / "x").prepare(settings(tmp_path))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_a_full_disk_while_appending(tmp_path):
    os.symlink("/dev/full", tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match="No space left"):
        append_line(tmp_path / "metrics.jsonl", "{}")


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "config.yaml"
    write_atomically(file, "old")

    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(UserError, match="free space"):
        write_atomically(file, "new")
    assert file.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_during_an_export_keeps_the_old_export(tmp_path):
    folder = started(tmp_path / "x")
    with folder.new_hf_folder(3) as made:
        (made / "weights").write_text("old")
    with pytest.raises(UserError, match="free space"), folder.new_hf_folder(3) as made:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(KeyError), folder.new_hf_folder(3) as made:
        raise KeyError("a bug stays a bug")
    assert [entry.name for entry in (folder.path / "hf").iterdir()] == ["step_000003"]
    assert (folder.hf_folder(3) / "weights").read_text() == "old"
    with folder.new_hf_folder(3) as made:
        (made / "weights").write_text("new")
    assert (folder.hf_folder(3) / "weights").read_text() == "new"


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


# What a step leaves


def sample(problem_id, *, response=(5, 6, 7), anchors=(), overlap=0.0, share=1.0, finished=True, reveal=True):
    problem = Problem(id=problem_id, problem="1+1?", solution="It is \\boxed{2}", answer="2")
    shown = Reveal(
        overlap=Overlap(score=overlap, anchors=anchors),
        share=share,
        shown_tokens=2,
        total_tokens=4,
        shown_text="It is ",
        reference=problem.solution,
    )
    rollout = Rollout(
        problem_id=problem_id, sample_index=0, prompt_ids=(1,), response_ids=response, logprobs=None, finished=finished
    )
    return Sample(
        problem=problem,
        sample_index=0,
        key=1,
        student_prompt_ids=(1, 2),
        response_ids=response,
        teacher_prompt_ids=(1, 3) if reveal else None,
        reveal=shown if reveal else None,
        rollout=rollout if reveal else None,
    )


ANCHORS = (Anchor(kind="boxed", text="2", found=True), Anchor(kind="number", text="17", found=False))
SAMPLES = (
    sample("a", anchors=ANCHORS, overlap=0.5, share=0.65),
    sample("b", response=(5,), share=1.0, finished=False),
)
SCORES = (
    SampleScore(
        loss_sum=3.0,
        num_tokens=3,
        loss_tokens=2,
        student_entropy_sum=1.5,
        teacher_entropy_sum=0.5,
        selected=(1,),
        divergence_selected_sum=2.0,
        divergence_other_sum=1.0,
        clipped_mass_sum=0.6,
        clipped_entries=6,
        sampler_gap_max=0.01,
    ),
    SampleScore(loss_sum=1.0, num_tokens=1, loss_tokens=1, student_entropy_sum=0.5, sampler_gap_max=0.02),
)
SECONDS = {"rollout": 1.0, "teacher": 0.5, "student": 0.5}


def metrics(samples=SAMPLES, scores=SCORES, seconds=SECONDS):
    return metrics_of(step=3, samples=samples, scores=scores, grad_norm=0.1, lr=5e-6, seconds=seconds)


def test_metrics_by_hand():
    assert metrics() == pytest.approx(
        {
            "step": 3,
            "loss": 4 / 3,
            "num_tokens": 4,
            "overlap/mean": 0.25,
            "reveal/mean": 0.825,
            "anchors/none_share": 0.5,
            "loss_tokens": 3,
            "entropy/student_mean": 0.5,
            "entropy/teacher_mean": 0.125,
            "selected/share": 0.25,
            "divergence/selected_mean": 2.0,
            "divergence/other_mean": 1 / 3,
            "clip/share": 0.2,
            "clip/entries": 2.0,
            "response/length_mean": 2.0,
            "response/truncated_share": 0.5,
            "grad_norm": 0.1,
            "lr": 5e-6,
            "sampler_gap/max": 0.02,
            "time/rollout_s": 1.0,
            "time/mask_s": 0.0,
            "time/teacher_s": 0.5,
            "time/student_s": 0.5,
            "time/optimizer_s": 0.0,
            "tokens_per_second": 2.0,
        }
    )
    assert metrics(seconds={**SECONDS, "step": 4.0})["tokens_per_second"] == 1.0


def test_metrics_with_nothing_to_count():
    empty = SampleScore(loss_sum=0.0, num_tokens=2, loss_tokens=0)
    made = metrics(samples=(sample("a", reveal=False),), scores=(empty,), seconds={})
    assert made["loss"] == made["clip/share"] == made["clip/entries"] == made["selected/share"] == 0.0
    names = ["overlap/mean", "reveal/mean", "anchors/none_share", "entropy/teacher_mean", "divergence/selected_mean"]
    assert all(math.isnan(made[name]) for name in [*names, "response/truncated_share", "tokens_per_second"])
    assert list(made) == list(metrics())
    assert '"overlap/mean": null' in to_json(made)


def test_sample_lines():
    report = StepReport(step=3, metrics={}, samples=SAMPLES, scores=SCORES)
    first, second = sample_lines(report, decode=lambda ids: " ".join(map(str, ids)))
    assert first == {
        "id": "a",
        "step": 3,
        "student_prompt_ids": [1, 2],
        "teacher_prompt_ids": [1, 3],
        "response_ids": [5, 6, 7],
        "response_text": "5 6 7",
        "overlap": 0.5,
        "anchors": [
            {"text": "2", "kind": "boxed", "found": True},
            {"text": "17", "kind": "number", "found": False},
        ],
        "reveal": {
            "share": 0.65,
            "shown_tokens": 2,
            "total_tokens": 4,
            "shown_text": "It is ",
            "reference_text": "It is \\boxed{2}",
        },
        "loss": 1.5,
        "selected": [1],
    }
    assert second["id"] == "b" and second["anchors"] == []


def test_samples_and_scores_must_match():
    with pytest.raises(ValueError):
        sample_lines(StepReport(step=3, metrics={}, samples=SAMPLES, scores=SCORES[:1]), decode=str)


def test_a_sample_without_a_teacher_has_nulls():
    report = StepReport(step=1, metrics={}, samples=(sample("a", reveal=False),), scores=SCORES[:1])
    line = sample_lines(report, decode=str)[0]
    assert line["teacher_prompt_ids"] is line["overlap"] is line["reveal"] is None and line["anchors"] == []


def test_clip_watch_speaks_at_the_tenth_step_above_the_limit():
    watch = ClipWatch()
    shares = [0.3] * 9 + [0.2] + [0.21] * 20
    said = {step: watch.update({"clip/share": share}) for step, share in enumerate(shares, 1)}
    assert [step for step, warning in said.items() if warning] == [20, 30]
    assert "above 0.2 for 10 steps (now 0.21)" in said[20] and "objective.loss.clip" in said[20]
