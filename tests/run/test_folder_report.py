"""The lines that a step leaves in the run folder, against numbers worked by hand."""

import math

import pytest

from megatron_paint.base.json_text import to_json
from megatron_paint.objectives.metrics import ClipWatch, metrics_of, sample_lines
from megatron_paint.records import (
    Anchor,
    Overlap,
    Problem,
    Reveal,
    Rollout,
    Sample,
    SamplerGap,
    SampleScore,
    StepReport,
    StepResult,
    UpdateReport,
)


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
        problem_id=problem_id, prompt_ids=(1, 2), response_ids=response, finished=finished if reveal else None
    )
    return Sample(
        problem=problem,
        key=1,
        rollout=rollout,
        teacher_prompt_ids=(1, 3) if reveal else None,
        reveal=shown if reveal else None,
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
        selected=(1,),
        sums={
            "student_entropy": 1.5,
            "teacher_entropy": 0.5,
            "divergence_selected": 2.0,
            "divergence_other": 1.0,
            "clipped_mass": 0.6,
            "clipped_entries": 6,
        },
        sampler_gap=SamplerGap(largest=0.01, position=1, total=0.02, above=0),
    ),
    SampleScore(
        loss_sum=1.0,
        num_tokens=1,
        loss_tokens=1,
        sums={"student_entropy": 0.5, "teacher_entropy": 0.0, "divergence_selected": 0.0, "divergence_other": 0.0},
        sampler_gap=SamplerGap(largest=0.12, position=0, total=0.12, above=1),
    ),
)
SECONDS = {"rollout": 1.0, "teacher": 0.5}  # the update adds its own


def metrics(samples=SAMPLES, scores=SCORES, seconds=SECONDS, student=0.5):
    update = UpdateReport(scores=scores, grad_norm=0.1, seconds={"student": student})
    result = StepResult(samples=samples, scores=scores, updates=(update,))
    return metrics_of(result, step=3, lr=5e-6, seconds=seconds)


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
            "sampler_gap/max": 0.12,
            "sampler_gap/mean": 0.035,
            "sampler_gap/above_share": 0.25,
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
    made = metrics(samples=(sample("a", reveal=False),), scores=(empty,), seconds={}, student=0.0)
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
        "sample": 0,
        "domain": "math",
        "student_prompt_ids": [1, 2],
        "teacher_prompt_ids": [1, 3],
        "response_ids": [5, 6, 7],
        "response_text": "5 6 7",
        "finished": True,
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
        "advantage": None,
        "sampler_gap": {"largest": 0.01, "position": 1, "total": 0.02, "above": 0},
    }
    assert second["id"] == "b"
    assert second["finished"] is False
    assert second["anchors"] == []


def test_samples_and_scores_must_match():
    with pytest.raises(ValueError, match="shorter"):
        sample_lines(StepReport(step=3, metrics={}, samples=SAMPLES, scores=SCORES[:1]), decode=str)


def test_a_sample_without_a_teacher_has_nulls():
    report = StepReport(step=1, metrics={}, samples=(sample("a", reveal=False),), scores=SCORES[:1])
    line = sample_lines(report, decode=str)[0]
    assert line["teacher_prompt_ids"] is line["overlap"] is line["reveal"] is line["finished"] is None
    assert line["anchors"] == []


def test_clip_watch_speaks_at_the_tenth_step_above_the_limit():
    watch = ClipWatch()
    shares = [0.3] * 9 + [0.2] + [0.21] * 20
    said = {step: watch.update({"clip/share": share}) for step, share in enumerate(shares, 1)}
    assert [step for step, warning in said.items() if warning] == [20, 30]
    assert "above 0.2 for 10 steps (now 0.21)" in said[20]
    assert "objective.loss.clip" in said[20]
