"""`megatron-paint search` on the quickstart: four short trials, killed and resumed, and two workers side by side."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import optuna
import pytest

from megatron_paint.base.errors import UserError
from megatron_paint.config.load import load_settings
from megatron_paint.evaluation.statistics import paired_difference
from megatron_paint.evaluation.summary import read_reports
from megatron_paint.run.folder import RunFolder
from megatron_paint.search.folder import read_folder
from megatron_paint.search.journal import JOURNAL
from megatron_paint.search.trial_run import trial_folder
from tests.search.spaces import ROOT, SETTINGS, write_space
from tests.search.stored import read_trials
from tests.support import forked_ranks
from tests.support.processes import children, left_of_session
from tests.support.results import metrics

TRIALS = 4
REFUSED_SEED = "3"  # of a search whose trial 1 has settings that exclude each other
OVERRIDES = ("data.problems_per_step=8", "evaluation.limit=20", "evaluation.samples=2")


def arguments(folder: Path, out: Path, *options: str, **sections: object) -> list[object]:
    space = write_space(folder, **{"pruner": {"rule": "median", "startup_trials": 2}} | sections)
    return ["search", SETTINGS, space, *OVERRIDES, "--trials", TRIALS, "--seed", "6", "--out", out, "--json", *options]


def search(folder: Path, out: Path, *options: str, **sections: object) -> forked_ranks.Ended:
    """The command, whose trials are forked, to its end."""
    return forked_ranks.start_command(folder, *arguments(folder, out, *options, **sections), limit=600).wait()


def notes(ended: forked_ranks.Ended) -> list[str]:
    """The messages of the events that it printed."""
    printed = [json.loads(line) for line in ended.out[0].splitlines() if line.startswith("{")]
    return [event["message"] for event in printed]


def started(ended: forked_ranks.Ended) -> list[int]:
    """The numbers of the trials that it started, in order."""
    found = [note.split(":")[0].split(",")[0] for note in notes(ended) if note.startswith("trial ")]
    return [int(words.split()[1]) for words in found if len(words.split()) == 2]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A study that nothing disturbed."""
    folder = tmp_path_factory.mktemp("unbroken")
    ended = search(folder, folder / "out")
    assert ended.statuses == [0], ended
    assert started(ended) == [0, 1, 2, 3]
    return folder / "out"


def test_trials_are_runs(unbroken):
    trials = read_trials(unbroken)
    assert len(trials) == TRIALS
    assert all(trial.is_ended and not trial.reason for trial in trials)
    for trial in trials:
        run = RunFolder(trial_folder(unbroken, trial.number))
        settings = load_settings(run.path / "logs" / "settings.yaml")
        assert settings == load_settings(run.config_file)
        assert settings.optimizer.lr == trial.chosen["optimizer.lr"]
        assert settings.objective.loss.clip == trial.chosen["objective.loss.clip"]
        for step, accuracy in trial.accuracies.items():
            assert accuracy == run.read_eval(step).metrics["avg"]
        assert run.read_eval(2).num_problems == 12
        assert trial.last_step == {"complete": 4, "pruned": 2}[trial.state]
    assert [trial.state for trial in trials[:2]] == ["complete"] * 2  # before `startup_trials`, none is pruned


def test_the_report(unbroken):
    report = json.loads((unbroken / "report.json").read_text())
    trials = read_trials(unbroken)
    complete = {trial.number: trial.accuracies[4] for trial in trials if trial.state == "complete"}
    best = report["best"]["trial"]["number"]
    assert complete[best] == max(complete.values())
    for measured in report["trials"]:
        run = RunFolder(trial_folder(unbroken, measured["trial"]["number"]))
        evaluated = run.read_eval(measured["step"])
        found = evaluated.metrics
        assert measured["accuracy"] == {"mean": found["avg"], "low": found["avg/low"], "high": found["avg/high"]}
        if measured["trial"]["number"]:
            default = RunFolder(trial_folder(unbroken, 0)).read_eval(measured["step"])
            expected = paired_difference(before=default, after=evaluated)
            assert measured["difference"] == {"mean": expected.mean, "low": expected.low, "high": expected.high}
    text = (unbroken / "report.md").read_text()
    assert text.count("| complete |") + text.count("| pruned |") == TRIALS
    assert (unbroken / "report.png").stat().st_size > 1000
    settings = load_settings(unbroken / "best.yaml")
    assert settings.optimizer.lr == trials[best].chosen["optimizer.lr"]
    assert (settings.run.steps, settings.evaluation.problems) == (50, "examples/quickstart/held_out.jsonl")


def test_the_best_trial_on_other_problems(unbroken):
    """Only the weights of trial 0 and of the best trial are kept, and these two are compared on the test problems."""
    report = json.loads((unbroken / "report.json").read_text())
    best = report["best"]["trial"]["number"]
    for trial in read_trials(unbroken):
        kept = trial.number in (0, best)
        assert (trial_folder(unbroken, trial.number) / "hf").exists() == kept, trial
    assert best
    ((default,), (better,)) = (read_reports(unbroken / "final" / f"{number:04d}") for number in (0, best))
    assert (default.benchmark, default.num_problems) == ("held_out", 20)
    expected = paired_difference(before=default, after=better)
    assert report["final"]["difference"]["mean"] == expected.mean
    assert report["final"]["best_accuracy"]["mean"] == better.metrics["avg"]


@pytest.mark.long
def test_the_comparison_stops_and_continues(unbroken, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(unbroken, out)
    shutil.rmtree(out / "final")
    running = forked_ranks.start_command(tmp_path, *arguments(tmp_path, out), limit=600)
    wait_for(out / "final" / "0000.log", running)
    os.kill(running.pid, signal.SIGTERM)
    ended = running.wait()
    assert ended.statuses == [75], ended
    assert "SIGTERM: the final comparison stops" in ended.err[0]
    assert left_of_session(running.pid) == {}
    assert "Not compared yet" in (out / "report.md").read_text()
    again = search(tmp_path, out)
    assert (again.statuses, started(again)) == ([0], []), again
    finals = [json.loads((place / "report.json").read_text())["final"] for place in (out, unbroken)]
    assert finals[0] == finals[1]


def test_a_finished_study_is_not_run_again(unbroken, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in (unbroken / "trials").rglob("*")}
    journal = (unbroken / JOURNAL).read_bytes()
    ended = search(tmp_path, unbroken)
    assert ended.statuses == [0], ended
    assert started(ended) == []
    assert {path: path.stat().st_mtime_ns for path in (unbroken / "trials").rglob("*")} == before
    assert (unbroken / JOURNAL).read_bytes() == journal


def test_killed_and_resumed(unbroken, tmp_path):
    """SIGKILL of everything in the middle of trial 1. The same command gives the trials of the unbroken study."""
    out = tmp_path / "out"
    running = forked_ranks.start_command(tmp_path, *arguments(tmp_path, out), limit=600)
    wait_for(trial_folder(out, 1) / "eval" / "step_000002.json", running)
    os.kill(running.pid, signal.SIGKILL)
    assert running.wait().statuses == [-9]
    assert left_of_session(running.pid) == {}  # the trial's processes end with the search
    killed = metrics(trial_folder(out, 1))
    assert [trial.state for trial in read_trials(out)] == ["complete", "running"]
    first = {path: path.stat().st_mtime_ns for path in trial_folder(out, 0).rglob("*")}
    ended = search(tmp_path, out)
    assert ended.statuses == [0], ended
    assert started(ended) == [1, 2, 3]
    resumed = metrics(trial_folder(out, 1))
    assert resumed[: len(killed)] == killed[: len(resumed)]
    assert {path: path.stat().st_mtime_ns for path in trial_folder(out, 0).rglob("*") if path in first} == first
    assert read_trials(out) == read_trials(unbroken)
    for trial in read_trials(out):  # a pruned run does a step or two more before it stops
        ours, theirs = (metrics(trial_folder(place, trial.number))[: trial.last_step] for place in (out, unbroken))
        assert len(ours) == trial.last_step
        assert ours == theirs, trial
    stored = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(out / JOURNAL)))
    assert len(optuna.load_study(study_name=None, storage=stored).trials) == TRIALS
    reports = [json.loads((place / "report.json").read_text()) for place in (out, unbroken)]
    assert reports[0] == reports[1]


def test_stopped_by_a_signal(tmp_path):
    """SIGTERM stops the trial with a checkpoint, and the search with status 75."""
    out = tmp_path / "out"
    running = forked_ranks.start_command(tmp_path, *arguments(tmp_path, out), limit=600)
    wait_for(trial_folder(out, 0) / "samples" / "step_000001.jsonl", running)
    os.kill(running.pid, signal.SIGTERM)
    ended = running.wait()
    assert ended.statuses == [75], ended
    assert "1 trial stops after the current step, with a checkpoint" in ended.err[0]
    assert RunFolder(trial_folder(out, 0)).latest_checkpoint()
    assert [trial.state for trial in read_trials(out)] == ["running"]
    assert not (out / "claims").exists() or not list((out / "claims").iterdir())


@pytest.mark.long
def test_stopped_by_slurm(tmp_path):
    """Slurm sends SIGTERM to every process of a job. A trial of two ranks stops with a checkpoint all the same."""
    out = tmp_path / "out"
    running = forked_ranks.start_command(tmp_path, *arguments(tmp_path, out, "--processes", "2"), limit=600)
    wait_for(trial_folder(out, 0) / "samples" / "step_000001.jsonl", running)
    (launcher,) = children(running.pid)
    for pid in (launcher, *children(launcher), launcher, running.pid):
        os.kill(pid, signal.SIGTERM)
    ended = running.wait()
    assert ended.statuses == [75], ended
    assert RunFolder(trial_folder(out, 0)).latest_checkpoint()
    assert [trial.state for trial in read_trials(out)] == ["running"]


@pytest.mark.long
def test_two_trials_side_by_side(tmp_path):
    """--jobs 2: every trial runs once. Each has a folder and a claim."""
    out = tmp_path / "out"
    ended = search(tmp_path, out, "--jobs", "2")
    assert ended.statuses == [0], ended
    assert sorted(started(ended)) == list(range(TRIALS))
    trials = read_trials(out)
    assert all(trial.is_ended and not trial.reason for trial in trials), trials
    overlap = [note for note in notes(ended) if note.startswith(("trial 0", "trial 1"))]
    assert overlap[1].startswith("trial 1: ")  # it starts before trial 0 has measured anything
    steps = Counter(line["step"] for line in metrics(trial_folder(out, 0)))
    assert steps == {1: 1, 2: 1, 3: 1, 4: 1}


@pytest.mark.long
def test_two_commands_share_the_trials(tmp_path):
    """The same command twice at the same time: two workers."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "megatron_paint", *map(str, arguments(tmp_path, out))]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    ends = []
    for process in workers:
        printed, errors = process.communicate(timeout=800)
        assert process.returncode == 0, errors
        ends.append(forked_ranks.Ended([0], [printed], [errors], 0.0))
    taken = [started(ended) for ended in ends]
    assert sorted([*taken[0], *taken[1]]) == list(range(TRIALS))
    assert all(taken), taken  # each had some
    trials = read_trials(out)
    assert all(trial.is_ended and not trial.reason for trial in trials), trials
    report = json.loads((out / "report.json").read_text())
    assert len(report["trials"]) == TRIALS
    assert {measured["trial"]["state"] for measured in report["trials"]} <= {"complete", "pruned"}


def test_a_killed_trial_is_started_again(tmp_path):
    """The run alone dies, as of the kernel's out-of-memory killer: the search continues it."""
    out = tmp_path / "out"
    running = forked_ranks.start_command(tmp_path, *arguments(tmp_path, out, "--trials", "1"), limit=600)
    wait_for(trial_folder(out, 0) / "checkpoints" / "step_000002" / "complete", running)
    (run,) = children(running.pid)
    os.kill(run, signal.SIGKILL)
    ended = running.wait()
    assert ended.statuses == [0], ended
    assert "trial 0 ended with exit status -9 and is started again from step 2" in notes(ended)
    assert [line["step"] for line in metrics(trial_folder(out, 0))] == [1, 2, 3, 4]
    assert [trial.state for trial in read_trials(out)] == ["complete"]


def test_a_combination_that_the_settings_refuse_is_a_failed_trial(tmp_path):
    parameters = {
        "objective.loss.clip": {"choices": [None, 0.05]},
        "objective.loss.divergence": {"choices": ["forward_kl", "jsd"]},
    }
    out = tmp_path / "out"
    ended = search(tmp_path, out, "--trials", "2", "--seed", REFUSED_SEED, parameters=parameters)
    assert ended.statuses == [0], ended
    given, refused = read_trials(out)
    assert (given.state, refused.state) == ("complete", "failed")
    assert refused.reason.startswith("the settings refuse this combination: objective.loss.clip=0.05")
    assert f"* Trial 1 failed: {refused.reason}" in (out / "report.md").read_text()
    assert not (trial_folder(out, 1) / "config.yaml").exists()


def test_given_settings_that_cannot_train_end_the_search(tmp_path):
    """Nothing could be compared with a trial 0 that fails."""
    out = tmp_path / "out"
    ended = search(tmp_path, out, "run.sampler_gap_limit=1e-12")
    assert ended.statuses == [2], ended
    assert "trial 0, the given settings, fails, and nothing can be compared with it: exit status 2: " in ended.err[0]
    assert "run.sampler_gap_limit=1e-12" in ended.err[0]
    (trial,) = read_trials(out)
    assert trial.state == "running"
    assert trial.reason.startswith("exit status 2: ")
    again = search(tmp_path, out, "run.sampler_gap_limit=1e-12")
    assert (again.statuses, started(again)) == ([2], [0])  # after the cause is gone, this continues


def test_another_search_in_the_folder_is_refused(unbroken, tmp_path):
    ended = search(tmp_path, unbroken, "--seed", "2")
    assert ended.statuses == [2]
    assert "holds a search that began otherwise: seed: 6 -> 2" in ended.err[0]
    with pytest.raises(UserError, match="has no search"):
        read_folder(tmp_path, {})


def test_a_mistake_in_the_data_is_found_before_any_trial(tmp_path):
    out = tmp_path / "out"
    ended = search(tmp_path, out, "data.train=missing.jsonl")
    assert ended.statuses == [2]
    assert "missing.jsonl" in ended.err[0]
    assert not out.exists()


def test_validation_problems_may_not_be_test_problems(tmp_path):
    ended = search(tmp_path, tmp_path / "out", "evaluation.problems=examples/search/validation.jsonl")
    assert ended.statuses == [2]
    assert "12 of 12 problems are in evaluation.problems=examples/search/validation.jsonl too" in ended.err[0]


def wait_for(path: Path, running: forked_ranks.Running) -> None:
    deadline = time.monotonic() + 300
    while not path.exists():
        assert running.is_alive, running.wait()
        assert time.monotonic() < deadline
        time.sleep(0.02)
