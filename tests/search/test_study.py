"""The study: keyed choices, trial 0, pruning, and trials that go from a dead worker to another."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from random import Random

import numpy as np
import optuna
import pytest

from megatron_paint.base.errors import UserError
from megatron_paint.search.journal import JOURNAL
from megatron_paint.search.study import SearchStudy
from tests.search.spaces import ROOT, space
from tests.search.stored import read_trials

STEPS, EVERY = 4, 2


def accuracy(chosen: dict) -> float:
    """An accuracy that depends on the settings alone. It stands for a run in tests of the study's bookkeeping."""
    return 1 / (1 + abs(np.log10(chosen["optimizer.lr"] / 2e-3)) + abs(chosen["objective.reveal.minimum"] - 0.5))


def run_one(study: SearchStudy, *, most: int) -> int | None:
    """Takes a trial, reports both evaluations and ends it; returns its number."""
    trial = study.take(most=most, patient=True)
    if trial is None:
        return None
    for step in (EVERY, STEPS):
        if study.report(trial.number, {step: accuracy(trial.chosen) * step / STEPS}) is not None:
            study.end(trial.number, "pruned")
            return trial.number
    study.end(trial.number, "complete")
    return trial.number


def opened(folder: Path, **sections: object) -> SearchStudy:
    return SearchStudy(folder, space(folder, **sections), seed=3)


def run_all(folder: Path, most: int, **sections: object) -> list:
    study = opened(folder, **sections)
    while run_one(study, most=most) is not None:
        pass
    return study.trials()


def test_trial_0_is_the_given_settings(tmp_path):
    study = opened(tmp_path)
    trial = study.take(most=1, patient=True)
    assert (trial.number, trial.chosen) == (0, study.space.default)
    assert study.take(most=1, patient=True) is None


def test_the_same_seed_chooses_the_same(tmp_path):
    """However often the study is closed and opened, and a trial is given back before its end."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    unbroken = run_all(tmp_path / "a", 8)
    for most in range(1, 9):
        study = opened(tmp_path / "b")
        given_up = study.take(most=most, patient=True)
        study.give_back(given_up.number)
        assert run_one(opened(tmp_path / "b"), most=most) == given_up.number == most - 1
    assert read_trials(tmp_path / "b") == unbroken
    assert len({str(trial.chosen) for trial in unbroken}) == 8
    other = SearchStudy(tmp_path / "b", space(tmp_path), seed=4)
    other.take(most=9, patient=True)
    (tmp_path / "c").mkdir()
    different = SearchStudy(tmp_path / "c", space(tmp_path), seed=4)
    for _ in range(2):
        run_one(different, most=2)
    assert different.trials()[0] == unbroken[0]
    assert different.trials()[1].chosen != unbroken[1].chosen


def test_choices_are_in_the_space(tmp_path):
    for trial in run_all(tmp_path, 12, pruner={"rule": "none"}):
        chosen = trial.chosen
        assert 1e-4 <= chosen["optimizer.lr"] <= 1e-2
        assert round(10 * chosen["objective.reveal.minimum"], 6) in range(11)
        assert ("objective.loss.clip_rule" in chosen) == (chosen["objective.loss.clip"] is not None)
        assert trial.state == "complete"


def test_median_pruning(tmp_path):
    """By hand: below the median of the trials that trained to their end, once there are enough of them."""
    trials = run_all(tmp_path, 14, pruner={"rule": "median", "startup_trials": 3})
    complete = []
    for trial in trials:
        half = trial.accuracies[EVERY]
        expected = len(complete) >= 3 and half < np.median([other.accuracies[EVERY] for other in complete])
        assert (trial.state == "pruned") == expected, trial
        if not expected:
            complete.append(trial)
    assert 2 < len(complete) < 13


def test_halving(tmp_path):
    """At the first rung, after 2 steps, a trial continues if it is in the better half of all that came there."""
    trials = run_all(tmp_path, 12, pruner={"rule": "halving", "factor": 2})
    assert trials[0].state == "complete"  # trial 0 is never pruned
    for number, trial in enumerate(trials[1:], start=1):
        there = sorted((other.accuracies[EVERY] for other in trials[1 : number + 1]), reverse=True)
        expected = trial.accuracies[EVERY] < there[max(len(there) // 2, 1) - 1]
        assert (trial.state == "pruned") == expected, trial
    assert {trial.state for trial in trials} == {"complete", "pruned"}


def test_the_decision_is_the_same_after_a_kill(tmp_path):
    """The evaluations of a resumed trial come together: the first one that asks for pruning counts."""
    study = opened(tmp_path, pruner={"rule": "median", "startup_trials": 1})
    run_one(study, most=1)
    trial = study.take(most=2, patient=True)
    high = {2: 0.0, 4: 1.0}
    assert study.report(trial.number, {2: 0.0}) == 2
    study.give_back(trial.number)
    again = opened(tmp_path, pruner={"rule": "median", "startup_trials": 1})
    assert again.take(most=2, patient=True).number == trial.number
    assert again.report(trial.number, high) == 2


WORKER = """
import os, sys
from pathlib import Path
from tests.search.test_study import opened
study = opened(Path(sys.argv[1]))
print(study.take(most=3, patient=True).number, flush=True)
sys.stdin.read()
"""


def worker(folder: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, str(folder)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_workers_share_trials_and_inherit_those_of_a_dead_one(tmp_path):
    workers = [worker(tmp_path) for _ in range(2)]
    try:
        numbers = [int(process.stdout.readline()) for process in workers]
        assert sorted(numbers) == [0, 1]
        study = opened(tmp_path)
        assert study.take(most=3, patient=True).number == 2
        assert study.take(most=3, patient=True) is None
        dead = numbers[0]
        workers[0].send_signal(signal.SIGKILL)
        workers[0].wait()
        before = study.trials()[dead].chosen
        taken = study.take(most=3, patient=False)
        assert (taken.number, taken.chosen) == (dead, before)
        assert study.take(most=3, patient=True) is None
    finally:
        for process in workers:
            process.kill()
            process.wait()
    assert [trial.state for trial in read_trials(tmp_path)] == ["running"] * 3


ALL = """
import sys
from pathlib import Path
from tests.search.test_study import opened, run_one
study = opened(Path(sys.argv[1]))
print("opened", flush=True)
while run_one(study, most=int(sys.argv[2])) is not None:
    pass
"""


def test_a_worker_killed_at_any_moment(tmp_path):
    """In the midst of a choice, a report, an end: the next one continues, and the trials are those of no kill."""
    for name in "ab":
        (tmp_path / name).mkdir()
    unbroken, most = run_all(tmp_path / "a", 20), 20
    random, kills = Random(7), 0
    while True:
        process = subprocess.Popen(
            [sys.executable, "-c", ALL, str(tmp_path / "b"), str(most)],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout.readline() == "opened\n"
        try:
            process.wait(random.uniform(0.0, 0.8))
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
    assert process.returncode == 0
    assert kills >= 2
    assert read_trials(tmp_path / "b") == unbroken


def test_the_end_of_trials(tmp_path):
    study = opened(tmp_path)
    run_one(study, most=1)
    failed = study.take(most=2, patient=True)
    study.end(failed.number, "failed", reason="exit status 2: no such file")
    trials = study.trials()
    assert [(trial.state, trial.reason) for trial in trials] == [
        ("complete", ""),
        ("failed", "exit status 2: no such file"),
    ]
    assert study.take(most=2, patient=True) is None
    assert trials[0].accuracies == {2: accuracy(trials[0].chosen) / 2, 4: accuracy(trials[0].chosen)}
    stored = optuna.load_study(
        study_name=None,
        storage=optuna.storages.JournalStorage(
            optuna.storages.journal.JournalFileBackend(str(tmp_path / JOURNAL)),
        ),
    )
    assert stored.best_value == accuracy(trials[0].chosen)
    assert not (tmp_path / "claims" / "0000").exists()


def test_trial_0_is_tried_again(tmp_path):
    study = opened(tmp_path)
    study.take(most=2, patient=True)
    study.note_failure(0, "exit status 2: no such file")
    study.give_back(0)
    again = opened(tmp_path)
    assert [(trial.state, trial.reason) for trial in again.trials()] == [("running", "exit status 2: no such file")]
    assert run_one(again, most=2) == 0
    assert [(trial.state, trial.reason) for trial in again.trials()] == [("complete", "")]
    assert run_one(again, most=2) == 1


def test_importance(tmp_path):
    """The accuracy depends on two of the parameters, and an irrelevant one gets less than either of them."""
    run_all(tmp_path, 40, pruner={"rule": "none"}, sampler={"startup_trials": 40})
    found = opened(tmp_path, pruner={"rule": "none"}, sampler={"startup_trials": 40}).importance()
    assert sum(found.values()) == pytest.approx(1)
    assert max(found, key=found.get) in ("optimizer.lr", "objective.reveal.minimum")
    assert found["optimizer.lr"] + found["objective.reveal.minimum"] > 0.6


@pytest.mark.parametrize("line", ["{cut", "hello", "[1, 2]", '{"worker_id": 1}'])
def test_a_damaged_line_of_the_journal_is_named_and_nothing_changes(tmp_path, line):
    run_all(tmp_path, most=1)
    journal = tmp_path / JOURNAL
    lines = journal.read_text().splitlines()
    journal.write_text("\n".join([*lines[:2], line, *lines[3:], ""]))
    before = journal.read_bytes()
    with pytest.raises(UserError, match=r"journal\.log:3: the line is damaged.* give another --out"):
        opened(tmp_path)
    assert journal.read_bytes() == before


def test_trials_of_another_program_are_refused(tmp_path):
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(tmp_path / JOURNAL)))
    study = optuna.create_study(study_name="search", storage=storage, direction="maximize")
    study.optimize(lambda trial: trial.suggest_float("optimizer.lr", 1e-4, 1e-2, log=True), n_trials=1)
    with pytest.raises(UserError, match="trial 0 is not of this search; another program has written it"):
        opened(tmp_path)
