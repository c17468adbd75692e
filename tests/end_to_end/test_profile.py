"""Profiled runs: the same numbers to the bit, and traces and a time line that agree with metrics.jsonl."""

import gzip
import json
import shutil
import statistics
from collections import defaultdict

import pytest

from megatron_paint.cli.main import main
from megatron_paint.run.folder import RunFolder
from megatron_paint.run.timeline import PHASES, RankTimes, read_timeline
from tests.support import forked_ranks
from tests.support.exports import same, weights_of_step
from tests.support.results import check_complete, metrics

CLOSE = 0.005  # seconds: between the timer and a trace, in the middle of all phases
FAR = 0.5  # for a single phase on a busy machine, where a process may have to wait between two readings


def profiled(folder, settings, *arguments, **how):
    ended = forked_ranks.train(folder, settings, *arguments, **how)
    assert set(ended.statuses) == {0}, ended
    # torch's remark about tensors that are older than a profile with run.profile.memory
    lines = [line for text in ended.err for line in text.splitlines() if "Memory block of unknown size" not in line]
    assert not lines
    return ended


def check_same_results(run, other, steps=(1, 2, 3, 4)):
    """Numbers, samples, evaluations and weights are equal to the bit."""
    assert metrics(run) == metrics(other)
    for step in steps:
        name = RunFolder(run).samples_file(step).relative_to(run)
        assert (run / name).read_bytes() == (other / name).read_bytes()
    evaluations = sorted(file.name for file in (run / "eval").iterdir())
    assert evaluations
    assert evaluations == sorted(file.name for file in (other / "eval").iterdir())
    assert all((run / "eval" / name).read_bytes() == (other / "eval" / name).read_bytes() for name in evaluations)
    assert same(weights_of_step(run, steps[-1]), weights_of_step(other, steps[-1]))


def ranges_of(run, step, rank):
    """The ranges of phases in a trace, (name, start, seconds), in the order of their start."""
    events = json.loads(gzip.decompress(RunFolder(run).trace_file(step, rank).read_bytes()))["traceEvents"]
    assert sum(e.get("cat") == "cpu_op" for e in events) > 100
    found = [e for e in events if e.get("cat") == "user_annotation" and e["name"] in ("step", *PHASES)]
    return sorted((e["name"], e["ts"] / 1e6, e["dur"] / 1e6) for e in found)


def check_trace(run, times: RankTimes) -> None:
    """The trace has the ranges of the time line, and each is inside of `step` or after it."""
    by_name, spans = defaultdict(list), defaultdict(list)
    for name, start, seconds in ranges_of(run, times.step, times.rank):
        by_name[name].append((start, seconds))
    for span in times.spans:
        spans[span.phase].append((span.start, span.seconds))
    assert {name: len(found) for name, found in by_name.items()} == {n: len(found) for n, found in spans.items()}
    ((step_start, step_seconds),) = by_name["step"]
    differences = []
    for name, found in by_name.items():
        for (start, seconds), (_, wanted) in zip(sorted(found), sorted(spans[name]), strict=True):
            differences.append(abs(seconds - wanted))
            if name in ("checkpoint", "export", "evaluation"):
                assert start >= step_start + step_seconds
            else:
                assert step_start <= start
                assert start + seconds <= step_start + step_seconds
    assert statistics.median(differences) < CLOSE
    assert max(differences) < FAR


def check_times(run, step, *, ranks, traced, phases):
    """The time line of a step on all ranks. On rank 0 it is what metrics.jsonl has."""
    everyone = read_timeline(RunFolder(run).timeline_file).steps[step]
    assert [one.rank for one in everyone] == list(range(ranks))
    for one in everyone:
        assert set(one.phases()) == {*phases, "other"}
        assert one.clock_error_s == 0.0  # the ranks are on one machine
        assert sum(one.phases().values()) == pytest.approx(one.seconds)
        ((step_start, step_seconds),) = ((s.start, s.seconds) for s in one.spans if s.phase == "step")
        assert one.start <= step_start
        assert step_start + step_seconds <= one.start + one.seconds
        assert (one.operators is not None) == (one.rank in traced)
        if one.rank in traced:
            assert set(one.operators.cpu) >= set(phases)
            check_trace(run, one)
    # All are in the step at the same time.
    assert max(one.start for one in everyone) < min(one.start + one.seconds for one in everyone)
    (line,) = (one for one in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if one["step"] == step)
    found = everyone[0].phases()
    timed = {name[5:-2]: seconds for name, seconds in line.items() if name.startswith("time/")}
    assert timed == pytest.approx({name: found.get(name, 0.0) for name in timed}, rel=1e-9)


@pytest.fixture(scope="module")
def run(trained, tmp_path_factory):
    """The undisturbed run, profiled in steps 2 and 3 on both ranks."""
    folder = tmp_path_factory.mktemp("profile")
    options = "run.profile={steps: [2, 3], ranks: [0, 1], memory: true}"
    ended = profiled(folder, trained.settings, f"run.dir={folder / 'run'}", options)
    notes = [event["message"] for event in map(json.loads, ended.out[0].splitlines()) if event["event"] == "note"]
    assert [note.split(" is in ")[0] for note in notes if note.startswith("profile of")] == [
        "profile of step 2",
        "profile of step 3",
    ]
    return folder / "run"


STEP = ("rollout", "mask", "teacher", "student", "optimizer")


def test_a_profiled_run_has_the_same_results(run, trained):
    check_same_results(run, trained.run)
    assert not (trained.run / "profile").exists()
    assert sorted(file.name for file in (run / "profile").iterdir()) == [
        *(f"step_00000{step}_rank_000{rank}.trace.json.gz" for step in (2, 3) for rank in (0, 1)),
        "timeline.json",
    ]


def test_traces_and_time_line_agree_with_the_metrics(run):
    check_times(run, 2, ranks=2, traced=(0, 1), phases=(*STEP, "checkpoint", "evaluation"))
    check_times(run, 3, ranks=2, traced=(0, 1), phases=STEP)


def test_the_command_prints_it(run, capsys):
    assert main(["inspect", "profile", str(run), "--rank", "1"]) == 0
    text = capsys.readouterr().out
    for title in ("Step 2 with what follows it: ", "Step 2, rank 1", "Step 3 with what follows it: ", "Step 3, rank 1"):
        assert title in text


def test_a_resumed_run_may_choose_other_steps_and_ranks(run, trained, tmp_path):
    """It passes step 3 again, traced on one rank alone."""
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("step_000004*", "tensorboard"))
    folder = RunFolder(tmp_path / "run")
    before = {file: file.read_bytes() for file in folder.profile.iterdir()}
    options = ("run.resume=auto", "run.profile={steps: [1, 3], ranks: [1], phases: [student]}")
    profiled(tmp_path, trained.settings, f"run.dir={folder.path}", *options)
    check_same_results(folder.path, trained.run)
    after = {file: file.read_bytes() for file in folder.profile.iterdir()}
    changed = {file for file in before if after.get(file) != before[file]}
    assert changed == {folder.trace_file(3, 0), folder.trace_file(3, 1), folder.timeline_file}
    assert folder.trace_file(3, 0) not in after
    assert [name for name, _, _ in ranges_of(folder.path, 3, 1)] == ["student"]
    second, third = read_timeline(folder.timeline_file).steps.values()
    assert [one.operators is not None for one in (*second, *third)] == [True, True, False, True]
    assert {one.step for one in third} == {3}
    ended = profiled(tmp_path, trained.settings, f"run.dir={folder.path}", "run.resume=auto", "run.profile.steps=[2]")
    assert "no step is profiled" not in ended.out[0], "the run is complete"


def test_a_full_disk_ends_no_run(run, trained, tmp_path):
    """Rank 1 may write files that are smaller than its trace, and larger than anything else."""
    size = len(gzip.decompress(RunFolder(run).trace_file(3, 1).read_bytes())) // 2
    folder = RunFolder(tmp_path / "run")
    options = "run.profile={steps: [3], ranks: [0, 1]}"
    ended = profiled(tmp_path, trained.settings, f"run.dir={folder.path}", options, file_size={1: size})
    warnings = [event["message"] for event in map(json.loads, ended.out[0].splitlines()) if event["event"] == "warning"]
    (warning,) = (message for message in warnings if message.startswith("the profile"))
    assert warning == (
        f"the profile of step 3 is not complete: Cannot write {folder.trace_file(3, 1)}: torch's profiler wrote no "
        "complete trace, probably because the disk is full; free space there, or write to another disk"
    )
    assert {file.name for file in folder.profile.iterdir()} == {"step_000003_rank_0000.trace.json.gz", "timeline.json"}
    check_times(folder.path, 3, ranks=2, traced=(0,), phases=STEP)
    check_same_results(folder.path, trained.run)
    check_complete(folder.path)


def test_four_ranks_that_grade_and_export(trained, tmp_path):
    """Two stages of two ranks; the ranks 1 and 2 are traced."""
    four = (
        *("megatron.pipeline_model_parallel_size=2", "data.order=adastar", "run.steps=1"),
        *("evaluation.limit=1", "evaluation.grading_seconds=60"),
    )
    runs = tmp_path / "plain", tmp_path / "profiled"
    profiled(tmp_path, trained.settings, f"run.dir={runs[0]}", *four, processes=4)
    profile = "run.profile={steps: [1], ranks: [1, 2], stacks: true}"
    profiled(tmp_path, trained.settings, f"run.dir={runs[1]}", *four, profile, processes=4)
    check_same_results(runs[1], runs[0], steps=(1,))
    check_times(runs[1], 1, ranks=4, traced=(1, 2), phases=PHASES)


def test_what_the_run_does_not_have_is_refused_before_it_starts(trained, tmp_path, capsys):
    command = ["train", str(trained.settings), f"run.dir={tmp_path / 'run'}", "--processes", "2"]
    for profile, says in (
        ("{steps: [2, 5]}", "run.profile.steps has step 5, but run.steps=4: choose steps from 1 to 4"),
        ("{steps: [2], ranks: [2]}", "run.profile.ranks has rank 2, but the run has 2 ranks: choose from 0 to 1"),
    ):
        assert main([*command, f"run.profile={profile}"]) == 2
        assert capsys.readouterr().err == f"megatron-paint: error: {says}\n"
    assert not (tmp_path / "run").exists()
